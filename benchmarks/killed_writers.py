"""Writers that are killed at random moments, and writers whose disk is full: the file is the old one or the new one."""

import os
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from hostile_files import model
from torch import nn

import nmcompile
from nmcompile.errors import NMCompileError
from nmcompile.files.write_atomically import write_atomically

VERSIONS = 2  # contents that take turns
Write = Callable[[Path, int], object]
Check = Callable[[Path], object]


def writers() -> Mapping[str, tuple[Write, Check]]:
    """Return each writer of files with the reader that tells whether a file is whole."""
    x = torch.randn(2, 4, 4, 4)
    compiled = [_compiled(version, x) for version in range(VERSIONS)]
    reports = [nmcompile.inspect(one) for one in compiled]

    def state(path: Path, version: int) -> None:
        write_atomically(path, safetensors.torch.save(nmcompile.sparse_state_dict(compiled[version])))

    def onnx(path: Path, version: int) -> None:
        nmcompile.export(compiled[version], path, args=(x,), verify=False)

    return {
        "report.html": (lambda path, version: reports[version].to_html(path), _check_html),
        "state.safetensors": (state, lambda path: safetensors.torch.load_file(path)),
        "choices.json": (lambda path, _: nmcompile.save_choices(path), lambda path: nmcompile.load_choices(path)),
        "model.onnx": (onnx, lambda path: nmcompile.verify(path)),
    }


def _compiled(version: int, x: torch.Tensor) -> nn.Module:
    plain = model()
    with torch.no_grad():
        plain[0].weight.add_(version)
    compiled = nmcompile.compile(plain, "weights", args=(x,)).eval()
    compiled(x)
    return compiled


def _check_html(path: Path) -> None:
    if not path.read_text().rstrip().endswith("</html>"):
        raise ValueError(f"{path} is cut off")


def run_kills(count: int, seed: int) -> dict[str, dict[str, int]]:
    """Kill each writer `count` times, between the start of a write and twice the time that one takes."""
    dice, results = random.Random(seed), {}
    for name, (write, check) in writers().items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            write(path, 0)  # the first one imports what it needs
            start = time.perf_counter()
            write(path, 0)
            taken = time.perf_counter() - start
            torn = sum(_killed(write, check, path, 2 * taken * dice.random()) for _ in range(count))
            write(path, 0)
            left = [one.name for one in Path(folder).iterdir() if one != path]
        results[name] = {"kills": count, "torn files": torn, "files left over after the next write": len(left)}
        print(name, results[name])
    return results


def _killed(write: Write, check: Check, path: Path, seconds: float) -> bool:
    """Return whether a file is not whole after its writer was killed."""
    child = os.fork()
    if not child:
        version = 0
        while True:
            version = (version + 1) % VERSIONS
            write(path, version)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        check(path)
    except Exception as error:  # the finding
        print(f"{path.name}: {error}")
        return True
    return False


def run_full_disk(count: int, seed: int) -> dict[str, dict[str, int]]:
    """Let each write fail at a random size of its files, which the system refuses to let grow further."""
    dice, results = random.Random(seed), {}
    for name, (write, check) in writers().items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            write(path, 0)
            outcomes = [_limited(write, path, dice.randrange(path.stat().st_size)) for _ in range(count)]
            check(path)
            left = [one.name for one in Path(folder).iterdir() if one != path]
        results[name] = {
            "writes": count,
            "refused with an error": outcomes.count(True),
            "changed files": outcomes.count(False),
            "files left over": len(left),
        }
        print(name, results[name])
    return results


def _limited(write: Write, path: Path, size: int) -> bool:
    """Return whether a write that may not exceed `size` bytes raises the project's error and changes nothing."""
    before = path.read_bytes()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            write(path, 1)
        except NMCompileError:
            os._exit(3)
        except BaseException:
            os._exit(4)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 3 and path.read_bytes() == before
