"""What exact resumption needs beside `state_dict()`: masks, step counts and the random stream, as named tensors."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nmcompile.errors import StateError, nearest
from nmcompile.ir.grid_steps import ActivationStep
from nmcompile.ir.modules import ThreeGemm
from nmcompile.ir.three_gemm import GemmTriple
from nmcompile.training.masks import STALE, WeightMask

FORMAT = 1


def triples_of(model: nn.Module) -> Iterator[GemmTriple]:
    """Every three-GEMM layer of a compiled model."""
    for module in model.modules():
        if isinstance(module, ThreeGemm):
            yield from module.three_gemms.values()


def masks_of(model: nn.Module) -> dict[str, WeightMask]:
    """The masks of a compiled model by the name of their weight."""
    masks = (triple.mask for triple in triples_of(model))
    return {mask.name: mask for mask in masks if isinstance(mask, WeightMask)}


def sparse_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What `state_dict()` does not hold, as tensors that safetensors can write.

    Keys: `<weight>.mask` (bool), `<weight>.clock` (int64: optimizer steps, 1 if the mask is stale), `<layer>.draw`
    (int64: backward calls), `<layer>.clip` and `<layer>.output_clip` (float32, NaN until calibrated; of quantized
    inputs and outputs), `seed` and `format`.

    Raises:
        StateError: the model is not compiled.
    """
    triples = _compiled(model)
    state = {"format": torch.tensor(FORMAT), "seed": torch.tensor(triples[0].stream.seed)}
    for name, mask in masks_of(model).items():
        state[f"{name}.mask"] = mask.tensor.detach().clone()
        state[f"{name}.clock"] = torch.tensor([mask.steps, int(mask.clock[STALE])])
    for triple in triples:
        state[f"{triple.layer.name}.draw"] = triple.stream.draw.clone()
        for step in triple.steps.activations:
            state[_clip_key(step)] = step.clip.detach().clone()
    return state


def load_sparse_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what `sparse_state_dict` returned, after `load_state_dict`: training goes on bit for bit.

    Raises:
        StateError: the model is not compiled, or the state is of another format, plan or shape; nothing is loaded then.
    """
    triples = _compiled(model)
    expected = sparse_state_dict(model)
    _check(state, expected)
    for name, mask in masks_of(model).items():
        steps, stale = (int(value) for value in state[f"{name}.clock"])
        mask.tensor.copy_(state[f"{name}.mask"])
        mask.steps = steps
        mask.accept_version()
        mask.clock[STALE] = stale
    for triple in triples:
        triple.stream.seed = int(state["seed"])
        triple.stream.draw.copy_(state[f"{triple.layer.name}.draw"])
        for step in triple.steps.activations:
            if not state[_clip_key(step)].isnan():
                step.calibrate(state[_clip_key(step)])


def _clip_key(step: ActivationStep) -> str:
    return f"{step.layer}.output_clip" if step.row.operand == "output" else f"{step.layer}.clip"


def _compiled(model: nn.Module) -> list[GemmTriple]:
    triples = list(triples_of(model))
    if not triples:
        raise StateError(f"{type(model).__name__} holds no three-GEMM layer; give a model that nmcompile.compile made")
    return triples


def _check(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    if "format" not in state or int(state["format"]) > FORMAT:
        raise StateError(
            f"sparse state of format {state.get('format', 'none')} cannot be read; this version reads up to {FORMAT}"
        )
    for name in expected.keys() - state.keys():
        raise StateError(
            f"the sparse state lacks {name!r}; {nearest(name, state)}; compile with the mode it was saved in"
        )
    for name in state.keys() - expected.keys():
        raise StateError(f"the model has nothing for {name!r} of the sparse state; {nearest(name, expected)}")
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            shapes = f"{tuple(state[name].shape)}, the model's is {tuple(tensor.shape)}"
            raise StateError(f"{name!r} of the sparse state has shape {shapes}")
