"""Checkpoints of an unfinished run: parameters, buffers, sparse state and optimizer, in one safetensors file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nmcompile.api.decompile import is_compiled
from nmcompile.api.sparse_state import load_sparse_state_dict, sparse_state_dict
from nmcompile.errors import FileError
from nmcompile.files.read_files import parse_json, read_record
from nmcompile.files.write_atomically import write_atomically

LARGEST = 2**34  # bytes
MODEL, SPARSE, OPTIMIZER = "model/", "sparse/", "optimizer/"


@dataclass(frozen=True)
class Position:
    """Where a run stopped: `epoch` epochs of all phases are done, the last one in phase `phase`.

    `curve` has a test of the model after each epoch.
    """

    configuration: dict[str, str | int | float | None]
    phase: int
    epoch: int
    curve: list[dict[str, float | None]]
    seconds: float


def save_checkpoint(path: Path, position: Position, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Replace the checkpoint at `path`; make its folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{MODEL}{name}": value for name, value in model.state_dict().items()}
    if is_compiled(model):
        tensors |= {f"{SPARSE}{name}": value for name, value in sparse_state_dict(model).items()}
    tensors |= {f"{OPTIMIZER}{name}": value for name, value in _optimizer_tensors(optimizer).items()}
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    write_atomically(path, safetensors.torch.save(plain, {"position": json.dumps(asdict(position))}))


def read_position(path: Path) -> Position | None:
    """Return where the run of a checkpoint stopped; `None` if there is no checkpoint.

    Raises:
        FileError: the file is not a checkpoint.
    """
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("position", "")
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path}: not a whole checkpoint ({error}); remove it to start the run again") from error
    return read_record(Position, parse_json(text, str(path)), str(path))


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load what `save_checkpoint` saved into the same model and optimizer: training continues bit for bit."""
    tensors = safetensors.torch.load_file(path)
    parts: dict[str, dict[str, Tensor]] = {MODEL: {}, SPARSE: {}, OPTIMIZER: {}}
    for name, value in tensors.items():
        part = next(part for part in parts if name.startswith(part))
        parts[part][name.removeprefix(part)] = value
    model.load_state_dict(parts[MODEL])
    if is_compiled(model):
        load_sparse_state_dict(model, parts[SPARSE])
    _load_optimizer(optimizer, parts[OPTIMIZER])


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    states: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, state in states.items() for name, value in state.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".")
        states.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
