"""Copies of module trees without FSDP2 and tensor parallelism: without their hooks, classes, states and DTensors."""

import copy
import sys
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nmcompile.arguments import Kwargs
from nmcompile.sharded import gathered, is_sharded, refuse_partitioned
from nmcompile.three_gemm.rewritten import Rewritten, made_from, rebuild

SPLITTERS = "torch.distributed.fsdp.", "torch.distributed.tensor."
MARKS = "__composable_api_state_key", "_is_fsdp_managed_module", "_fsdp_use_orig_params", "_distribute_module_applied"
"""Prefixes of the names under which modules remember that they were split."""


def without_hooks(attributes: Kwargs) -> dict[str, object]:
    """Return a module's attributes without the hooks that gather, split and move its tensors."""
    return {name: _own_hooks(value) if name.endswith("_hooks") else value for name, value in attributes.items()}


def unsharded_copy(model: nn.Module) -> nn.Module:
    """Copy a model as a single process would hold it. Every process of a split model has to call."""
    refuse_partitioned(model)
    fully_sharded = _fully_sharded(model)
    for module in fully_sharded:
        module.reshard()  # tensors gathered for a call may have another dtype
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if is_sharded(tensor)]
    memo: dict[int, object] = {
        id(tensor): tensor.detach().clone() for module in model.modules() for tensor in _computed(module)
    }
    if not tensors and not fully_sharded:
        return copy.deepcopy(model, memo)
    memo |= {id(tensor): _whole(tensor) for tensor in tensors}
    shells = {module: _shell(module, type(module)) for module in fully_sharded}  # FSDP2 refuses copies
    memo.update((id(module), shell) for module, shell in shells.items())
    for module, shell in shells.items():
        shell.__dict__.update(copy.deepcopy(_own(module), memo))
    plain: nn.Module = copy.deepcopy(model, memo)
    for module in plain.modules():
        attributes = _own(module)
        module.__dict__.clear()
        module.__dict__.update(attributes)
    return plain


def _computed(module: nn.Module) -> list[Tensor]:
    """Return tensors with a history, which torch refuses to copy: weights that hooks computed, values in caches."""
    leaves = pytree.tree_leaves(vars(module))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_leaf]


def _fully_sharded(model: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def _whole(tensor: Tensor) -> Tensor:
    whole = gathered(tensor)
    return nn.Parameter(whole, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else whole


def _shell(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Return an empty module of the class that `kind` was before `fully_shard`."""
    first, *rest = kind.__bases__
    if issubclass(first, Rewritten):
        return rebuild(first, type(_shell(module, rest[0])), *made_from(module))
    if rest and issubclass(first, sys.modules["torch.distributed.fsdp"].FSDPModule):
        return _shell(module, rest[0])
    empty: nn.Module = kind.__new__(kind)
    return empty


def _own(module: nn.Module) -> dict[str, object]:
    attributes = without_hooks(module.__dict__)
    return {n: value for n, value in attributes.items() if not (n.startswith(MARKS) or _is_gathering(value))}


def _is_gathering(value: object) -> bool:
    """Return whether a value is a method that `register_fsdp_forward_method` put around the class's own."""
    function = value.__func__ if isinstance(value, MethodType) else None
    return isinstance(function, FunctionType) and function.__globals__["__name__"].startswith(SPLITTERS)


def _own_hooks(hooks: object) -> object:
    if not isinstance(hooks, dict):  # a GraphModule has lists with such names
        return hooks
    own = {key: hook for key, hook in hooks.items() if not _origin(hook).startswith(SPLITTERS)}
    return hooks if len(own) == len(hooks) else type(hooks)(own)


def _origin(hook: object) -> str:
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", ""))
