"""The modules that call three-GEMM triples: same object, same parameters, same class and one more.

A module is rewritten by giving it a subclass of its own class; `restore` gives the class back. So hooks, references to
the module, `isinstance` and `state_dict` keys stay the same.
"""

import copy
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor, fx, nn

from nmcompile.arguments import Kwargs
from nmcompile.config import Phase
from nmcompile.errors import ConfigError, PassError
from nmcompile.three_gemm.adapter_merging import allow_merging
from nmcompile.three_gemm.by_hand import BY_HAND
from nmcompile.three_gemm.fast_paths import open_fast_path
from nmcompile.three_gemm.instance_forward import change_class, wrapper_of_own
from nmcompile.three_gemm.mask_source import MaskSource
from nmcompile.three_gemm.rewritten import RESERVED, Rewritten, put_class, region_class
from nmcompile.three_gemm.triple import GemmTriple
from nmcompile.weight_cache import forget

STEPS = "nmcompile_steps"
"""Key of the metadata of a state dict: how many optimizer steps a module has made with its masks."""


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
            triple.stream.move(_device_after(fn, triple.stream.draw))
            for step in triple.steps.activations:
                step.move(_device_after(fn, step.clip))
        return result


def _device_after(fn: Callable[[Tensor], Tensor], x: Tensor) -> torch.device:
    """Return the device to which `fn` moves a tensor whose dtype it must not change; it does not change bool's."""
    return fn(torch.empty(0, dtype=torch.bool, device=x.device)).device


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


def install(module: nn.Module, mixin: type[ThreeGemm], triples: dict[str, GemmTriple]) -> None:
    """Make `module` run `triples` through the forward of a mixin."""
    module.__dict__["three_gemms"] = triples
    put_class(module, mixin)


def install_graph(module: nn.Module, graph: fx.Graph, triples: dict[str, GemmTriple]) -> None:
    """Make `module` run `triples` through a forward generated from its own graph."""
    module.__dict__.update(three_gemms=triples, three_gemm_graph=graph)
    mixin = ThreeGemmGraph if isinstance(module, fx.GraphModule) else ThreeGemmRegion
    change_class(module, region_class(mixin, type(module), graph, module.__dict__.get(BY_HAND, ())))


def restore(module: nn.Module) -> None:
    """Give a rewritten module its own class back; leave others unchanged.

    Raises:
        PassError: something else has changed the class since (a parametrization, FSDP).
    """
    open_fast_path(module)
    allow_merging(module)
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
    for name in RESERVED:
        module.__dict__.pop(name, None)
    change_class(module, type(module).__bases__[1])


def run_three_gemm(
    three_gemms: dict[str, GemmTriple], role: str, input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Run a functional conv/linear node; the target of such nodes in a generated forward."""
    return three_gemms[role](input, weight, bias)
