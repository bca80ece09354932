"""The modules that call three-GEMM triples: same object, same parameters, same class and one more.

A module is rewritten by giving it a subclass of its own class; `restore` gives the class back. So hooks, references to
the module, `isinstance` and `state_dict` keys stay the same.
"""

import copy
from collections.abc import Callable
from typing import NoReturn, SupportsIndex
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn

from nmcompile.arguments import Args, Kwargs
from nmcompile.config import Phase
from nmcompile.errors import ConfigError, PassError
from nmcompile.ir.generated_code import GeneratedModule
from nmcompile.three_gemm.instance_forward import GENERATED, change_class, wrapper_of_own
from nmcompile.three_gemm.mask_source import MaskSource
from nmcompile.three_gemm.triple import GemmTriple
from nmcompile.weight_cache import forget

STEPS = "nmcompile_steps"
"""Key of the metadata of a state dict: how many optimizer steps a module has made with its masks."""
RECORD = "_nmcompile"
"""Attribute of a compiled model that records how it was compiled."""
FINALIZED = "_nmcompile_finalized"
"""Attribute of a finalized model that records the masks that its weights obey, and the places of those in slices."""


RESERVED = ("three_gemms", "three_gemm_graph", "absorbing_layer")


class Rewritten:
    """Mixin of every module whose class was changed; its additional state is in the module's `__dict__`."""

    PREFIX = "ThreeGemm"

    def __reduce_ex__(self, protocol: SupportsIndex) -> Args:
        # The class is made at run time, so its ingredients are pickled (and copied) instead.
        mixin, base = type(self).__bases__
        return rebuild, (mixin, base, self.__dict__.get("three_gemm_graph")), self.__dict__


class ThreeGemm(Rewritten):
    """Mixin of every module that runs three-GEMM graphs; `three_gemms` holds them by role.

    A conv or linear layer has one triple, with role `""`; its graphs are the three properties below. A module whose
    forward calls several (attention, functional calls) has one for each.
    """

    three_gemms: dict[str, GemmTriple]

    @property
    def forward_graph(self) -> fx.GraphModule:
        """Return the graph of Y = X Wᵀ + b, with the pruning that the plan has for the forward GEMM."""
        return self._only_graph(Phase.FORWARD)

    @property
    def backward_graph(self) -> fx.GraphModule:
        """Return the graph of dX = dY W, with the pruning that the plan has for the backward GEMM."""
        return self._only_graph(Phase.BACKWARD)

    @property
    def update_graph(self) -> fx.GraphModule:
        """Return the graph of dW = dYᵀ X and db, with the pruning that the plan has for the update GEMM."""
        return self._only_graph(Phase.UPDATE)

    def _release(self) -> None:
        """Free the cached values of the weights: torch cannot swap tensors that are weakly referenced."""
        forget(list(self.parameters()))  # type: ignore[attr-defined]
        for triple in self.three_gemms.values():
            triple.thaw()

    def _only_graph(self, phase: Phase) -> fx.GraphModule:
        if len(self.three_gemms) != 1:
            roles = ", ".join(self.three_gemms)
            raise AttributeError(f"this module runs several layers ({roles}); use three_gemms[role].graphs[phase]")
        return next(iter(self.three_gemms.values())).graphs[phase]

    def _replicate_for_data_parallel(self) -> NoReturn:
        names = ", ".join(triple.layer.name for triple in self.three_gemms.values())
        raise ConfigError(
            f"layer {names!r}: nn.DataParallel runs replicas in threads, which would share a mask and a random stream; "
            "use DistributedDataParallel, or one device"
        )

    def _save_to_state_dict(self, destination: dict[str, object], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata[STEPS] = max((mask.steps for mask in self._masks()), default=0)

    def _load_from_state_dict(
        self, state_dict: Kwargs, prefix: str, local_metadata: dict[str, int], *args: object, **kwargs: object
    ) -> None:
        self._release()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)  # type: ignore[misc]
        # Weights from a file of only tensors come without metadata, and may come from any training.
        steps = local_metadata.get(STEPS, 0 if "version" in local_metadata else 1)
        for mask in self._masks():
            mask.note_load(steps)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)  # type: ignore[misc]
        for mask in self._masks():
            mask.note_assignment()

    def _masks(self) -> list[MaskSource]:
        triples: dict[str, GemmTriple] = self.__dict__.get("three_gemms", {})
        return [triple.mask for triple in triples.values() if triple.mask is not None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        masks = self._masks()
        for mask in masks:
            mask.look()
        self._release()
        result: nn.Module = super()._apply(fn, recurse)  # type: ignore[misc]
        for mask in masks:
            mask.move(fn(mask.tensor))
        for triple in self.three_gemms.values():
            for step in triple.steps.activations:
                # `fn` only changes the device of a bool tensor; the clip stays float32.
                step.move(fn(torch.empty(0, dtype=torch.bool, device=step.clip.device)).device)
        return result


class ThreeGemmLayer(ThreeGemm):
    """A conv or linear module."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return self.three_gemms[""](input, self.weight, self.bias)


class ThreeGemmRegion(ThreeGemm):
    """A module whose forward is generated from its graph, because it calls a functional conv or linear."""

    three_gemm_graph: fx.Graph


class ThreeGemmGraph(ThreeGemmRegion):
    """A GraphModule with a generated forward. Its own deepcopy would keep only what its graph names."""

    def __deepcopy__(self, memo: dict[int, object]) -> "ThreeGemmGraph":
        replica = object.__new__(type(self))
        memo[id(self)] = replica
        replica.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return replica


def check_names(model: nn.Module) -> None:
    """Raise if a plain module uses a name that a rewritten one needs.

    Raises:
        ConfigError: names the module.
    """
    for path, module in model.named_modules():
        own = {*vars(module), *module._modules, *module._parameters, *module._buffers}
        for name in RESERVED:
            if not isinstance(module, Rewritten) and (name in own or hasattr(type(module), name)):
                raise ConfigError(
                    f"module {path!r} ({type(module).__name__}) has an attribute {name!r}, under which a compiled "
                    "module keeps its graphs; rename it"
                )


def install(module: nn.Module, mixin: type[ThreeGemm], triples: dict[str, GemmTriple]) -> None:
    """Make `module` run `triples` through the forward of a mixin."""
    module.__dict__["three_gemms"] = triples
    put_class(module, mixin)


def put_class(module: nn.Module, mixin: type[Rewritten]) -> None:
    """Give `module` a subclass of its own class and the mixin."""
    change_class(module, _layer_class(mixin, type(module)))


def install_graph(module: nn.Module, graph: fx.Graph, triples: dict[str, GemmTriple]) -> None:
    """Make `module` run `triples` through a forward generated from its own graph."""
    module.__dict__.update(three_gemms=triples, three_gemm_graph=graph)
    mixin = ThreeGemmGraph if isinstance(module, fx.GraphModule) else ThreeGemmRegion
    change_class(module, _region_class(mixin, type(module), graph))


def restore(module: nn.Module) -> None:
    """Give a rewritten module its own class back; leave others unchanged.

    Raises:
        PassError: something else has changed the class since (a parametrization, FSDP).
    """
    for kind, (switch, _) in FAST_PATHS.items():
        if isinstance(module, kind) and "three_gemm_fast_path" in module.__dict__:
            setattr(module, switch, module.__dict__.pop("three_gemm_fast_path"))
    if not isinstance(module, Rewritten):
        return
    if len(type(module).__bases__) != 2 or not issubclass(type(module).__bases__[0], Rewritten):
        raise PassError(
            f"{type(module).__name__} was changed again after nmcompile.compile (by a parametrization or FSDP?); undo "
            "that before decompiling or compiling again"
        )
    if wrapper := wrapper_of_own(module):
        raise PassError(
            f"{type(module).__name__}.forward was wrapped after nmcompile.compile ({wrapper}, by mixed precision of "
            "Accelerate?); unwrap it first: accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
        )
    for name in ("three_gemms", "three_gemm_graph", "absorbing_layer"):
        module.__dict__.pop(name, None)
    change_class(module, type(module).__bases__[1])


# The layer's inference kernel reads the dense weights of its children, and the encoder packs a padded batch into a
# nested tensor that only that kernel takes. Without them, padded positions hold the same in eval() as in train(), and
# the same as in eager with gradients on; eager's packed batches hold zeros there.
FAST_PATHS: dict[type[nn.Module], tuple[str, object]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
"""Attribute by class that opens torch's inference fast path, and the value that closes it."""


def turn_off_fast_path(model: nn.Module) -> None:
    """Keep torch's encoders that hold rewritten layers from their inference fast path."""
    for module in model.modules():
        for kind, (switch, closed) in FAST_PATHS.items():
            if isinstance(module, kind) and any(isinstance(m, ThreeGemm) for m in module.modules()):
                module.__dict__.setdefault("three_gemm_fast_path", getattr(module, switch, closed))
                setattr(module, switch, closed)


def run_three_gemm(
    three_gemms: dict[str, GemmTriple], role: str, input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Run a functional conv/linear node; the target of such nodes in a generated forward."""
    return three_gemms[role](input, weight, bias)


_classes: "WeakValueDictionary[tuple[type, type], type[nn.Module]]" = WeakValueDictionary()


def _layer_class(mixin: type[Rewritten], base: type[nn.Module]) -> type[nn.Module]:
    """Return the class for a mixin and base, which equal layers share as long as a module has it."""
    found = _classes.get((mixin, base))
    if found is None:
        members = {"__module__": base.__module__}
        found = _classes[mixin, base] = type(f"{mixin.PREFIX}{base.__name__}", (mixin, base), members)
    return found


def generated_forward(graph: fx.Graph) -> Callable[..., object]:
    """Return the function that a graph is the code of."""
    # Only the generated code is wanted; the module itself will hold the attributes that it names. The stored graph gets
    # no owner, which would be pickled with it.
    attributes = {str(node.target): None for node in graph.nodes if node.op in ("call_module", "get_attr")}
    forward: Callable[..., object] = type(GeneratedModule(attributes, copy.deepcopy(graph))).forward
    setattr(forward, GENERATED, True)
    return forward


def _region_class(mixin: type[Rewritten], base: type[nn.Module], graph: fx.Graph) -> type[nn.Module]:
    members = {"__module__": base.__module__, "forward": generated_forward(graph)}
    return type(f"ThreeGemm{base.__name__}", (mixin, base), members)


def rebuild(mixin: type[Rewritten], base: type[nn.Module], graph: fx.Graph | None) -> nn.Module:
    """Make an empty module of the class that `install` or `install_graph` gives a module of class `base`."""
    plain = base.__new__(base)
    if graph is not None:
        plain.__class__ = _region_class(mixin, base, graph)
    else:
        plain.__class__ = _layer_class(mixin, base)
    return plain
