"""Files of measured choices, which save a later process on this machine the measurement."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nmcompile.backends.shared.known_choices import known_choices, take_over
from nmcompile.checks import check_path
from nmcompile.errors import FileError, StateError, nearest
from nmcompile.files.read_files import parse_json, read_record, read_regular
from nmcompile.files.write_atomically import write_atomically
from nmcompile.ir.choice import Choice

KERNELS = ("dense", "sparse", "integers")
LARGEST_FILE = 2**26  # bytes: some hundred thousand choices


def save_choices(path: str | os.PathLike[str]) -> None:
    """Write the choices that were measured in this process as JSON, for `load_choices` in another on this machine."""
    measured = {problem: choice for problem, choice in known_choices().items() if choice.seconds is not None}
    found = {problem: asdict(choice) for problem, choice in measured.items()}
    write_atomically(check_path("path", path), json.dumps({"setting": _setting(), "choices": found}, indent=2).encode())


def load_choices(path: str | os.PathLike[str]) -> None:
    """Use the choices in a file that `save_choices` wrote, instead of measuring their problems.

    Raises:
        FileError: no such file, or not a file of that kind; nothing is taken over then.
        StateError: it was measured on another machine, or with another PyTorch.
    """
    try:
        setting, found = _saved(check_path("path", path))
    except FileError as error:
        raise FileError(f"measured choices cannot be read: {error}; write them with save_choices") from error
    if setting != _setting():
        raise StateError(f"{path} was measured with {setting}, and this is {_setting()}; measure again and save that")
    take_over(found)


@dataclass(frozen=True)
class _Saved:
    """The content of a file of choices: where they were measured, and the fields of each by its problem."""

    setting: dict[str, str]
    choices: dict[str, dict[str, str | float | None]]


def _saved(path: Path) -> tuple[dict[str, str], dict[str, Choice]]:
    document = parse_json(read_regular(path, LARGEST_FILE), str(path), largest=LARGEST_FILE)
    saved = read_record(_Saved, document, str(path))
    return saved.setting, {key: _choice_of(values, f"{path}: {key!r}") for key, values in saved.choices.items()}


def _choice_of(values: Mapping[str, str | float | None], name: str) -> Choice:
    choice = read_record(Choice, values, name)
    if choice.kernel not in KERNELS:
        raise FileError(f"{name}: kernel {choice.kernel!r} is unknown; {nearest(choice.kernel, KERNELS)}")
    if any(isinstance(value, float | int) and value < 0 for value in values.values()):
        raise FileError(f"{name}: a time below 0")
    return choice


def _setting() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"torch": torch.__version__, "processor": name or platform.processor(), "cuda": device}
