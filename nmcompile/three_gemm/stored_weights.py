"""The dense weights of layers: parameters, or values computed by parametrizations, hooks or a forward."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx.node import Argument
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from nmcompile.ir.captured import Site
from nmcompile.ir.expression import value_of
from nmcompile.sharded import gathered
from nmcompile.three_gemm.modules import run_three_gemm

Hook = WeightNorm | SpectralNorm | prune.BasePruningMethod


def is_computed_in_forward(model: nn.Module, site: Site) -> bool:
    """Return whether a generated forward, and no parametrization or hook, computes the weight of a layer."""
    if not site.is_expression or "three_gemm_graph" not in model.get_submodule(site.module).__dict__:
        return False
    path, _, attribute = site.weight.rpartition(".")
    owner = model.get_submodule(path)
    return not parametrize.is_parametrized(owner, attribute) and weight_hook(owner, attribute) is None


@torch.no_grad()
def stored_weight(model: nn.Module, site: Site) -> Tensor | None:
    """Return the dense weight of a compiled model's layer, computed if necessary; None if it cannot be computed."""
    if is_computed_in_forward(model, site):
        return _computed(model.get_submodule(site.module), site.role)
    path, _, attribute = site.weight.rpartition(".")
    owner = model.get_submodule(path)
    if site.is_expression and not parametrize.is_parametrized(owner, attribute):
        hook = weight_hook(owner, attribute)
        return None if hook is None else _value(hook, owner)
    return named_weight(model, site.weight)


def named_weight(model: nn.Module, name: str) -> Tensor | None:
    """Return the tensor of a full name, computed if it is parametrized, gathered if it is split; or None."""
    path, _, attribute = name.rpartition(".")
    try:
        weight = getattr(model.get_submodule(path), attribute, None)
    except AttributeError:
        return None
    return gathered(weight) if isinstance(weight, Tensor) else None


def weight_hook(module: nn.Module, attribute: str) -> Hook | None:
    """Find the hook of `torch.nn.utils` that computes an attribute before each forward."""
    for hook in module._forward_pre_hooks.values():
        name = getattr(hook, "_tensor_name", getattr(hook, "name", None))
        if isinstance(hook, Hook) and name == attribute:
            return hook
    return None


def make_plain(module: nn.Module, attribute: str) -> None:
    """Replace a weight that a parametrization or a hook of `torch.nn.utils` computes by a parameter with its value."""
    hook = weight_hook(module, attribute)
    removers: dict[type[Hook], Callable[[nn.Module, str], object]] = {
        WeightNorm: remove_weight_norm,
        SpectralNorm: remove_spectral_norm,
        prune.BasePruningMethod: prune.remove,
    }
    for kind, remove in removers.items():
        if isinstance(hook, kind):
            remove(module, attribute)
    if parametrize.is_parametrized(module, attribute):
        module.__class__ = _own_class(module)
        # Without gradients torch would leave a plain tensor instead of a parameter.
        with torch.enable_grad():
            parametrize.remove_parametrizations(module, attribute)


@dataclass(frozen=True)
class Place:
    """Position of a slice's elements in a parameter."""

    parameter: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def look(self, model: nn.Module) -> Tensor:
        """Return the present slice of the model's parameter."""
        parameter = model.get_parameter(self.parameter)
        return self.within(parameter, parameter)

    def within(self, parameter: Tensor, copied: Tensor) -> Tensor:
        """Return the slice of a copy of the parameter: of the same shape and strides, in memory of its own."""
        offset = self.offset - int(parameter.storage_offset()) + int(copied.storage_offset())
        return copied.as_strided(self.size, self.stride, offset)


def find_place(model: nn.Module, site: Site, weight: Tensor) -> Place | None:
    """Find the parameter that a computed weight is a view of, each element once; None if it is a new tensor."""
    if any(stride == 0 and size > 1 for size, stride in zip(weight.shape, weight.stride(), strict=True)):
        return None
    for name, parameter in model.get_submodule(site.module).named_parameters(prefix=site.module):
        if parameter.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr():
            return Place(name, tuple(weight.shape), weight.stride(), int(weight.storage_offset()))
    return None


def _computed(module: nn.Module, role: str) -> Tensor:
    """Run the part of a generated forward that computes the weight of one of its layers."""
    nodes = module.__dict__["three_gemm_graph"].nodes
    (weight,) = (node.args[3] for node in nodes if node.target is run_three_gemm and node.args[1] == role)
    return value_of(weight, attribute=lambda name: _attribute(module, name), submodule=module.get_submodule)


def _attribute(module: nn.Module, target: str) -> Argument:
    path, _, name = target.rpartition(".")
    value: Argument = getattr(module.get_submodule(path), name)
    return gathered(value) if isinstance(value, Tensor) else value


def _value(hook: Hook, module: nn.Module) -> Tensor:
    """Return the weight that a hook computes in eval(), without another power iteration of a spectral norm."""
    if isinstance(hook, prune.BasePruningMethod):
        value: Tensor = hook.apply_mask(module)
    elif isinstance(hook, SpectralNorm):
        value = hook.compute_weight(module, do_power_iteration=False)
    else:
        value = hook.compute_weight(module)
    return value


def _own_class(module: nn.Module) -> type[nn.Module]:
    """Return a class like the module's that is not shared with the module's original.

    A parametrized weight is a property of the class, and is taken from there when the parametrization is removed.
    """
    shared = type(module)
    return type(shared.__name__, shared.__bases__, dict(vars(shared)))
