"""Hostile files: mutations of small valid ones, which a reader has to read or to refuse by an error of the project.

Readers run in child processes, a batch in each, so one that dies, hangs or takes too much memory is a finding and does
not end the run. What ever failed is kept in tests/corpus and read again by tests/files/test_corpus.py.
"""

import contextlib
import json
import multiprocessing
import random
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import onnx
import torch
from google.protobuf.message import Message
from torch import nn

import nmcompile
from nmcompile.errors import NMCompileError

CORPUS = Path(__file__).parents[1] / "tests" / "corpus"
BATCH = 500
SECONDS = 120.0  # for a batch
MEMORY = 4 * 2**30  # bytes of address space above that of the fresh child
NUMBERS = (b"-1", b"0", b"4294967296", b"9223372036854775807", b"1e999", b"NaN", b"null", b'"\\u0000"', b"[]", b"{}")
SIZES = (-1, 0, 1, 2**31 - 1, 2**31, 2**62, -(2**63))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))


@cache
def seeds() -> dict[str, bytes]:
    """Return one valid content for each kind of file."""
    x = torch.randn(2, 4, 4, 4)
    compiled = nmcompile.compile(model(), "weights", args=(x,))
    compiled(x)
    with tempfile.TemporaryDirectory() as folder:
        nmcompile.export(compiled.eval(), f"{folder}/model.onnx", args=(x,), verify=False)
        nmcompile.save_choices(f"{folder}/choices.json")
        layers = {"3": nmcompile.presets["training"], "re:5.*": None}
        return {
            "onnx": Path(folder, "model.onnx").read_bytes(),
            "choices": Path(folder, "choices.json").read_bytes(),
            "config": nmcompile.CompileConfig(layers=layers, sr_ste=2e-4).to_json().encode(),
            "report": nmcompile.inspect(compiled).to_json().encode(),
        }


def read(kind: str, content: bytes, folder: Path) -> None:
    """Read one file as its kind is read."""
    path = folder / f"hostile.{kind}"
    if kind == "onnx":
        path.write_bytes(content)
        nmcompile.verify(path)
    elif kind == "choices":
        path.write_bytes(content)
        nmcompile.load_choices(path)
    elif kind == "config":
        nmcompile.CompileConfig.from_json(content.decode("utf-8", "replace"))
    else:
        report().diff(content.decode("utf-8", "replace"))


@cache
def report() -> "nmcompile.api.analyze.Report":
    return nmcompile.analyze(model(), "weights")


def outcome(kind: str, content: bytes, folder: Path) -> str:
    """Return "read", the name of the project's error, or "FAILED" and what was raised in its place."""
    try:
        read(kind, content, folder)
    except NMCompileError as error:
        return type(error).__name__
    except Exception as error:  # the finding
        return f"FAILED: {type(error).__name__}: {error}"
    return "read"


def mutations(kind: str, content: bytes, dice: random.Random) -> Iterator[bytes]:
    """Yield mutated contents for ever."""
    while True:
        changed = content
        if kind == "onnx" and dice.random() < 0.5:
            changed = _changed_message(content, dice)
        for _ in range(dice.choice((0, 1, 1, 2, 4)) if changed is not content else dice.choice((1, 1, 2, 8))):
            changed = _changed_bytes(changed, dice)
        yield changed


def _changed_bytes(content: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(content) + 1)
    end = min(len(content), at + dice.choice((1, 2, 8, 64)))
    choice = dice.randrange(6)
    if choice == 0 and at < len(content):
        return content[:at] + bytes([content[at] ^ 1 << dice.randrange(8)]) + content[at + 1 :]
    if choice == 1:
        return content[:at] + content[end:]
    if choice == 2:
        return content[:at] + content[at:end] * dice.choice((2, 3, 100)) + content[end:]
    if choice == 3:
        return content[:at] + dice.randbytes(dice.choice((1, 2, 8))) + content[at:]
    if choice == 4 and dice.random() < 0.2:
        return content[:at]
    digits = [i for i in range(at, len(content)) if 48 <= content[i] < 58][:1]
    return content[: digits[0]] + dice.choice(NUMBERS) + content[digits[0] + 1 :] if digits else content


def _changed_message(content: bytes, dice: random.Random) -> bytes:
    """Change one field of a protobuf message somewhere inside the model."""
    message = onnx.ModelProto.FromString(content)
    with contextlib.suppress(ValueError):  # enums of closed protobuf versions refuse unknown numbers
        _change_field(message, dice)
    return message.SerializeToString()


def _change_field(changed: Message, dice: random.Random) -> None:
    while True:
        fields = [(field, value) for field, value in changed.ListFields()]
        field, value = dice.choice(fields)
        if field.type == field.TYPE_MESSAGE and dice.random() < 0.9:
            changed = value[dice.randrange(len(value))] if field.is_repeated else value
            if changed.ListFields():
                continue
        break
    if dice.random() < 0.2 or field.type == field.TYPE_MESSAGE:
        changed.ClearField(field.name)
    elif not field.is_repeated:
        setattr(changed, field.name, _other(field, value, dice))
    elif dice.random() < 0.5:
        value.append(_other(field, value[0], dice))
    else:
        value[dice.randrange(len(value))] = _other(field, value[0], dice)


def _other(field: object, value: object, dice: random.Random) -> object:
    if isinstance(value, str):
        return dice.choice(("", "x", "..", "/etc/passwd", value * 50, "\N{RIGHT-TO-LEFT OVERRIDE}"))
    if isinstance(value, bytes):
        return dice.choice((b"", value[: len(value) // 2], value * 2, dice.randbytes(16)))
    if isinstance(value, int):
        small = field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_ENUM)  # type: ignore[attr-defined]
        return max(-(2**31), min(2**31 - 1, dice.choice(SIZES))) if small else dice.choice(SIZES)
    return dice.choice((0.0, float("nan"), float("inf"), 1e38))


def _batch(kind: str, seed: int, count: int, pipe: "multiprocessing.connection.Connection") -> None:
    address = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address + MEMORY, address + MEMORY))
    made = mutations(kind, seeds()[kind], random.Random(seed))
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(count):
            content = next(made)
            pipe.send((content, None))
            pipe.send((content, outcome(kind, content, Path(folder))))
    pipe.close()


def run_batch(kind: str, seed: int, count: int) -> tuple[Counter[str], list[bytes]]:
    """Return how often each outcome came, and the contents that failed; a child that died or hung is one outcome."""
    seeds(), report()  # before the fork
    here, there = multiprocessing.get_context("fork").Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_batch, args=(kind, seed, count, there))
    child.start()
    there.close()
    found, failed, last, pending = Counter[str](), list[bytes](), b"", False
    try:
        while here.poll(SECONDS):
            last, result = here.recv()
            pending = result is None
            if result is not None:
                found[result.partition(": ")[0]] += 1
                if result.startswith("FAILED"):
                    failed.append(last)
                    print(f"{kind}, seed {seed}: {result[:200]}")
    except EOFError:
        pass
    finally:
        child.join(0 if pending else 10)
        child.kill()
        child.join()
    if pending or child.exitcode:
        found["DIED OR HUNG"] += 1
        failed.append(last)
    return found, failed


def run_fuzz(count: int, first_seed: int, seconds: float) -> dict[str, dict[str, int]]:
    """Read `count` hostile files, or as many as the time allows, equally many of each kind; keep what failed."""
    results = {kind: Counter[str]() for kind in seeds()}
    end = time.monotonic() + seconds
    for seed in range(first_seed, first_seed + max(1, count // len(results) // BATCH)):
        for kind, found in results.items():
            one, failed = run_batch(kind, seed, min(BATCH, count // len(results)))
            found += one
            for number, content in enumerate(failed):
                CORPUS.mkdir(exist_ok=True)
                (CORPUS / f"seed-{seed}-{number}.{kind}").write_bytes(content)
        if time.monotonic() > end:
            break
    for kind, found in results.items():
        print(kind, json.dumps(found))
    return {kind: dict(sorted(found.items())) for kind, found in results.items()}
