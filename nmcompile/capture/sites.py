"""Modules that are layers: those that inherit a conv or linear forward, and attention with its projections."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nmcompile.capture.names import join, own_class
from nmcompile.ir.captured import Site
from nmcompile.ir.layers import Layer, LinearLayer, conv_layer, conv_transpose_layer
from nmcompile.three_gemm.instance_forward import foreign_forward

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
ConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
RECURRENT = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
BILINEAR = "bilinear layer: its weight meets two inputs"
UNINITIALISED = "run the model once to initialise lazy layers"


@dataclass(frozen=True)
class FoundSite:
    """A site, and the ids of the parameters that its weight is, or is computed from."""

    site: Site
    parameters: frozenset[int]


@dataclass
class ModuleLayers:
    """The modules that are layers, and the modules that look like layers but are not."""

    found: list[FoundSite] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    python: dict[str, str] = field(default_factory=dict)


def find_module_layers(model: nn.Module) -> ModuleLayers:
    """Return the layers among a model's modules, each module once, in `named_modules` order."""
    result = ModuleLayers()
    inside: set[int] = set()
    for name, module in model.named_modules():
        if is_attention(module):
            inside.add(id(module.out_proj))
            result.found.extend(_attention_sites(name, module))
        elif isinstance(module, nn.MultiheadAttention):
            own = f"{type(module).__name__} has its own forward: its in_proj is not captured"
            result.python[name] = foreign_forward(module) or own
        elif id(module) in inside:
            continue
        elif is_recurrent(module):
            result.found.extend(_recurrent_sites(name, module))
        elif reason := _skip_reason(module):
            result.skipped[name] = reason
        elif is_layer(module):
            result.found.append(_module_site(name, module))
    return result


def norm_names(model: nn.Module) -> frozenset[str]:
    """Return the names of the modules that are one of torch's batch norms with running statistics."""
    norms = ((name, m) for name, m in model.named_modules() if own_class(m) in NORMS and not foreign_forward(m))
    return frozenset(name for name, m in norms if m.running_mean is not None)


def layer_base(module: nn.Module) -> type[nn.Module] | None:
    """Return the conv or linear class that a module derives from, whether or not it inherits the forward."""
    transformers = sys.modules.get("transformers.pytorch_utils")
    bases = (nn.Linear, *CONVS, *TRANSPOSED_CONVS, *((transformers.Conv1D,) if transformers else ()))
    return next((base for base in bases if isinstance(module, base)), None)


def is_layer(module: nn.Module) -> bool:
    """Return whether the module is a conv or linear that inherits its forward."""
    base = layer_base(module)
    if base is None or not _inherits(module, base, "forward"):
        return False
    return base not in CONVS or _inherits(module, base, "_conv_forward")


def is_attention(module: nn.Module) -> bool:
    """Return whether the module is an `nn.MultiheadAttention` that inherits its forward."""
    return isinstance(module, nn.MultiheadAttention) and _inherits(module, nn.MultiheadAttention, "forward")


def is_recurrent(module: nn.Module) -> bool:
    """Return whether the module is one of torch's recurrent layers, inherits its forward, and holds its weights."""
    base = next((base for base in RECURRENT if isinstance(module, base)), None)
    is_own = base is not None and _inherits(module, base, "forward")
    return is_own and all(isinstance(module._parameters.get(name), Tensor) for name in _gates(module))


def _gates(module: nn.Module) -> list[str]:
    """Return the attributes of a recurrent layer's weights."""
    names = module._flat_weights_names if isinstance(module, nn.RNNBase) else ["weight_ih", "weight_hh"]
    return [name for name in names if name.startswith("weight_")]


def _inherits(module: nn.Module, base: type[nn.Module], method: str) -> bool:
    is_own = not foreign_forward(module) if method == "forward" else method not in module.__dict__
    return is_own and getattr(type(module), method) is getattr(base, method)


def _skip_reason(module: nn.Module) -> str:
    if isinstance(module, nn.Bilinear):
        return BILINEAR
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return foreign_forward(module) or "recurrent layer with its own forward or computed weights"
    if isinstance(module, TRANSPOSED_CONVS) and module.groups > 1:
        is_depthwise = module.groups == module.in_channels
        return f"{'depthwise' if is_depthwise else 'grouped'} transposed convolution"
    origin = own_class(module).__module__
    if origin.startswith(("torch.ao.nn.", "torch.nn.")) and ".quantized." in origin and hasattr(module, "weight"):
        return "quantized layer"
    if isinstance(module, torch.jit.ScriptModule):
        owns_weight = "weight" in dict(module.named_parameters(recurse=False))
        return "TorchScript code cannot be rewritten" if owns_weight else ""
    if not is_layer(module):
        return ""
    tensors = [*module._parameters.values(), module.__dict__.get("weight")]
    if any(isinstance(tensor, nn.UninitializedParameter) for tensor in tensors):
        return UNINITIALISED
    weight = next((tensor for tensor in tensors if tensor is not None), None)
    if weight is None:
        weight = next(module.parameters(), None)
    return "" if weight is None or weight.is_floating_point() else f"its weight is {_short(weight.dtype)}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def weight_parameters(module: nn.Module, attribute: str) -> tuple[frozenset[int], bool]:
    """Return the ids of the parameters behind a weight, and whether it is computed from them."""
    plain = module._parameters.get(attribute)
    if plain is not None:
        return frozenset({id(plain)}), False
    parametrized = getattr(module, "parametrizations", {})
    if attribute in parametrized:
        return frozenset(id(parameter) for parameter in parametrized[attribute].parameters()), True
    prefix = f"{attribute}_"
    return frozenset(id(p) for name, p in module._parameters.items() if name.startswith(prefix) and p is not None), True


def own_matrices(module: nn.Module) -> frozenset[int]:
    """Return the ids of a module's own parameters with two or more dims, also in parametrizations and lists."""
    held: list[nn.Module] = [m for m in module.children() if isinstance(m, nn.ParameterList | nn.ParameterDict)]
    held += [module.get_submodule("parametrizations")] if parametrize.is_parametrized(module) else []
    owned = [*module.parameters(recurse=False), *(parameter for child in held for parameter in child.parameters())]
    known = (parameter for parameter in owned if not isinstance(parameter, nn.UninitializedParameter))
    return frozenset(id(parameter) for parameter in known if sum(size != 1 for size in parameter.shape) > 1)


def _module_site(name: str, module: nn.Module) -> FoundSite:
    parameters, is_expression = weight_parameters(module, "weight")
    site = Site(_layer(name, module), name, "", join(name, "weight"), is_expression)
    return FoundSite(site, parameters)


def _layer(name: str, module: nn.Module) -> Layer:
    has_bias = _has(module, "bias")
    shape = _stored_shape(module, "weight")
    if isinstance(module, nn.Linear):
        return LinearLayer(name, shape or (module.out_features, module.in_features), has_bias)
    if isinstance(module, TRANSPOSED_CONVS):
        return _transposed_layer(name, module, shape, has_bias)
    if not isinstance(module, CONVS):
        return LinearLayer(name, shape or (int(module.nx), int(module.nf)), has_bias, transposed=True)  # type: ignore[arg-type]
    return conv_layer(
        name,
        shape or (module.out_channels, module.in_channels // module.groups, *module.kernel_size),
        has_bias,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        padding_mode=module.padding_mode,
    )


def _transposed_layer(name: str, module: ConvTranspose, shape: tuple[int, ...] | None, has_bias: bool) -> Layer:
    padding = module.padding
    assert not isinstance(padding, str)
    return conv_transpose_layer(
        name,
        shape or (module.in_channels, module.out_channels, *module.kernel_size),
        has_bias,
        stride=module.stride,
        padding=padding,
        output_padding=module.output_padding,
        dilation=module.dilation,
    )


def _stored_shape(module: nn.Module, attribute: str) -> tuple[int, ...] | None:
    """Return the shape of a weight that can be read without computing it."""
    stored = module._parameters.get(attribute)
    stored = module.__dict__.get(attribute) if stored is None else stored
    return tuple(stored.shape) if isinstance(stored, Tensor) else None


def _has(module: nn.Module, attribute: str) -> bool:
    if attribute in getattr(module, "parametrizations", {}):
        return True
    return module._parameters.get(attribute) is not None or module.__dict__.get(attribute) is not None


def _recurrent_sites(name: str, module: nn.Module) -> Iterator[FoundSite]:
    for attribute in _gates(module):
        weight = module.get_parameter(attribute)
        has_bias = bool(module.bias) and not attribute.startswith("weight_hr")
        layer = LinearLayer(join(name, attribute), tuple(weight.shape), has_bias)
        yield FoundSite(Site(layer, name, attribute, join(name, attribute)), frozenset({id(weight)}))


def _attention_sites(name: str, module: nn.MultiheadAttention) -> Iterator[FoundSite]:
    width, has_bias = module.embed_dim, _has(module, "in_proj_bias")
    if module._qkv_same_embed_dim:
        widths = {"in_proj": (3 * width, width)}
    else:
        widths = {"q_proj": (width, width), "k_proj": (width, module.kdim), "v_proj": (width, module.vdim)}
    for role, shape in widths.items():
        parameters, is_expression = weight_parameters(module, f"{role}_weight")
        layer = LinearLayer(join(name, role), shape, has_bias)
        yield FoundSite(Site(layer, name, role, join(name, f"{role}_weight"), is_expression), parameters)
    parameters, is_expression = weight_parameters(module.out_proj, "weight")
    layer = LinearLayer(join(name, "out_proj"), (width, width), _has(module.out_proj, "bias"))
    yield FoundSite(Site(layer, name, "out_proj", join(name, "out_proj.weight"), is_expression), parameters)
