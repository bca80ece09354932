"""Weights and masks found from calibration data, in memory and, if asked, in a folder from which a run goes on."""

import hashlib
import io
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from pickle import UnpicklingError
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from nmcompile.errors import ConfigError, FileError
from nmcompile.files.write_atomically import write_atomically
from nmcompile.fingerprint import fingerprint
from nmcompile.ir.found_mask import FoundMask
from nmcompile.ir.layers import StackedLinearLayer
from nmcompile.quantization import Grid
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.grid_steps import ActivationStep
from nmcompile.three_gemm.like import like
from nmcompile.three_gemm.stored_weights import Place
from nmcompile.three_gemm.triple import GemmTriple
from nmcompile.training.find_masks import masks_of
from nmcompile.training.masks import WeightMask


@dataclass(frozen=True)
class Part:
    """A weight, or those of its rows that one call reads.

    Attention projects queries, keys and values by themselves, and each expert multiplies by a matrix of a stack.

    Args:
        weight: the full name of the weight.
        row: the first of the rows; those of a stack count through its matrices.
    """

    weight: str
    row: int


@dataclass(frozen=True)
class Solved:
    """A solved part of a weight.

    Args:
        mask: bool, of the part's shape.
        weight: its new values, zero off the mask; None if the method keeps the values.
        place: the elements of a parameter that the part is; None if it is computed from parameters.
        method: the method that found it.
        error: the relative error left in the layer's outputs.
        step: the step of the grid that the new values are on, or one for each row; None if they are on none.
        bias: the layer's new bias, `(out,)`; None if it stays.
        bias_place: the elements of a parameter that the bias is.
        clip: of the quantized inputs that the part was solved from; None if they are not quantized.
    """

    mask: Tensor
    weight: Tensor | None
    place: Place | None
    method: str
    error: float
    step: Tensor | None
    bias: Tensor | None = None
    bias_place: Place | None = None
    clip: float | None = None


class SolvedParts:
    """The parts that are solved so far.

    Args:
        folder: where each part is saved once it is solved; those of an interrupted run are read from there. None keeps
            them in memory only.
        run: text that identifies the model, the data and the method, see `identify_run`.

    Raises:
        ConfigError: the folder holds parts of another run.
        FileError: a file in the folder is damaged.
    """

    def __init__(self, folder: Path | None = None, run: str = "") -> None:
        self.folder = folder
        self.run = run
        self.parts: dict[Part, Solved] = {} if folder is None else dict(_read_parts(folder, run))

    def add(self, part: Part, solved: Solved) -> None:
        """Keep a solved part: in its file, if there is a folder, from which the system reads what is used."""
        if self.folder is not None:
            saved = io.BytesIO()
            torch.save(asdict(solved) | {"part": (part.weight, part.row), "run": self.run}, saved)
            path = self.folder / f"{hashlib.sha256(repr(part).encode()).hexdigest()[:16]}.pt"
            write_atomically(path, saved.getvalue())
            _, solved, _ = _read_part(path)
        self.parts[part] = solved


def identify_run(model: nn.Module, rules: Iterable[object], batches: Iterable[object]) -> str:
    """Return text that differs if the model, its tensors, the rules (method, patterns) or the batches of runs differ.

    Raises:
        ConfigError: a batch holds an object whose content cannot be compared.
    """
    content = repr(model), _content(model.state_dict(keep_vars=True)), list(map(str, rules)), _content(list(batches))
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _content(x: object) -> object:
    """Return a short representation of everything that a batch holds."""
    if isinstance(x, Tensor):
        return str(x.dtype), tuple(x.shape), fingerprint(x)
    if isinstance(x, np.ndarray) and not x.dtype.hasobject:
        return str(x.dtype), x.shape, hashlib.sha256(x.tobytes()).hexdigest()
    if isinstance(x, Mapping):
        return [(repr(key), _content(value)) for key, value in x.items()]
    if isinstance(x, list | tuple):
        return [type(x).__name__, *map(_content, x)]
    if x is None or isinstance(x, Real | str | bytes):
        return repr(x)
    raise ConfigError(
        f"checkpoint: the batches hold an object of type {type(x).__name__}, which cannot be compared with that of an "
        "interrupted run; give tensors, arrays, numbers and text, in lists and mappings"
    )


def _read_parts(folder: Path, run: str) -> Iterator[tuple[Part, Solved]]:
    for path in sorted(folder.glob("*.pt")):
        part, solved, made_by = _read_part(path)
        if made_by != run:
            raise ConfigError(
                f"checkpoint: {folder} holds masks for another model, other calibration data or another config; give "
                "a folder of its own"
            )
        yield part, solved


def _read_part(path: Path) -> tuple[Part, Solved, str]:
    """Return a part, what it was solved to, and the run that solved it; its tensors stay in the file until used."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        part, made_by = Part(*saved.pop("part")), saved.pop("run")
        for name in ("place", "bias_place"):
            saved[name] = saved[name] and Place(**saved[name])
        solved = Solved(**saved)
    except (OSError, RuntimeError, UnpicklingError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise FileError(f"{path}: not a whole file of masks ({type(error).__name__}); delete it") from error
    return part, solved, made_by


def settle(trial: nn.Module, parts: Mapping[Part, Solved]) -> None:
    """Make masks, steps of weights and clips of inputs stand in a trial as they were found; weights are kept."""
    masks = masks_of(trial)
    for name in dict.fromkeys(part.weight for part in parts):
        found = {part: solved for part, solved in parts.items() if part.weight == name}
        tensor = masks[name].tensor.clone()
        is_stack = isinstance(masks[name].layer, StackedLinearLayer)
        rows = tensor.flatten(0, 1) if is_stack else tensor
        for part, solved in found.items():
            rows[part.row : part.row + solved.mask.shape[0]].copy_(solved.mask)
        error = max(solved.error for solved in found.values())
        masks[name].stand(tensor, FoundMask(next(iter(found.values())).method, error))
    for triple in triples_of(trial):
        if isinstance(triple.mask, WeightMask):
            _settle_step(triple, {part: one for part, one in parts.items() if part.weight == triple.mask.name})
    for step, clip in found_clips(trial, parts):
        step.calibrate(clip)


def found_clips(trial: nn.Module, parts: Mapping[Part, Solved]) -> Iterator[tuple[ActivationStep, float]]:
    """Yield the steps of inputs whose clips were found with the weights, each with its clip."""
    for triple in triples_of(trial):
        name = triple.mask.name if isinstance(triple.mask, WeightMask) else None
        clips = {one.clip for part, one in parts.items() if part.weight == name}
        if triple.steps.input is not None and len(clips) == 1 and (clip := clips.pop()) is not None:
            yield triple.steps.input, clip


def _settle_step(triple: GemmTriple, parts: Mapping[Part, Solved]) -> None:
    """Make the step of a weight stand if all of it was rounded; parts with steps of their own have one a row.

    A layer that shares the weight, and whose own grid does not hold the values, keeps SAWB's step.
    """
    found = [one for _, one in sorted(parts.items(), key=lambda item: item[0].row)]
    steps = [one.step for one in found if one.step is not None]
    if not steps or len(steps) < len(found) or not all(holds(triple.steps.weight_grid, one) for one in found):
        return
    rows = [
        step if step.dim() else step.expand(len(one.mask), *[1] * (one.mask.dim() - 1))
        for step, one in zip(steps, found, strict=True)
    ]
    if isinstance(triple.site.layer, StackedLinearLayer):
        triple.steps.weight = torch.stack(rows)
    else:
        triple.steps.weight = steps[0] if len(steps) == 1 else torch.cat(rows)


def holds(grid: Grid | None, solved: Solved) -> bool:
    """Return whether a grid has an integer for every value of a part that was rounded."""
    if grid is None or solved.weight is None or solved.step is None:
        return False
    return bool((solved.weight.abs() < (grid.high + 0.5) * solved.step).all())  # half a step for 16-bit values


@torch.inference_mode(False)
@torch.no_grad()
def put_weights(model: nn.Module, parts: Mapping[Part, Solved], masked: Collection[str], inplace: bool) -> None:
    """Write the new values of masked weights and their biases into their parameters, or replace these parameters.

    Args:
        model: receives the weights.
        parts: with the new values.
        masked: the full names of the weights that have a mask; others stay as they are.
        inplace: write into the present parameters; else the model gets new ones, and those that other models share with
            it keep their values.
    """
    targets: dict[str, Tensor] = {}
    for part, solved in parts.items():
        for place, values in ((solved.place, solved.weight), (solved.bias_place, solved.bias)):
            if part.weight in masked and place is not None and values is not None:
                parameter = model.get_parameter(place.parameter)
                if not inplace and _is_all_of(place, parameter):
                    targets[place.parameter] = values.to(parameter.device)
                    continue
                target = targets.setdefault(place.parameter, parameter if inplace else parameter.detach().clone())
                place.within(parameter, target).copy_(values)
    for name, target in targets.items():
        if not inplace:
            _replace(model, model.get_parameter(name), target)


def _is_all_of(place: Place, parameter: Tensor) -> bool:
    """Return whether a place is all of a parameter, so that the new values can be its memory."""
    return place.size == tuple(parameter.shape) and place.stride == parameter.stride()


def _replace(model: nn.Module, old: nn.Parameter, values: Tensor) -> None:
    """Replace a parameter wherever the model holds it."""
    new = cast(nn.Parameter, like(old, values))
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is old:
                module._parameters[name] = new
