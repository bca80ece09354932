"""Tensors that are split among processes: DTensors, and the flat parameters of FSDP1."""

from typing import TYPE_CHECKING, TypeGuard, cast

from torch import Tensor, nn

from nmcompile.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

PLAIN = Tensor, nn.Parameter


def is_sharded(x: object) -> "TypeGuard[DTensor]":
    """Return whether `x` is a DTensor."""
    return type(x) not in PLAIN and hasattr(x, "device_mesh")


def gathered(x: Tensor) -> Tensor:
    """Return a DTensor in full and detached, which every process has to call; return any other tensor unchanged."""
    return cast("DTensor", x.detach()).full_tensor() if is_sharded(x) else x


def like_shard(x: Tensor, weight: "DTensor") -> "DTensor":
    """Return `x`, equal on all processes, as a DTensor placed like `weight`; nothing is communicated."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh
    replicated = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=weight.placements)


FSDP1 = (
    "FullyShardedDataParallel (FSDP1) module, which trains flat parameters in place of weights: their masks would miss "
    "its optimizer steps; use FSDP2, torch.distributed.fsdp.fully_shard (fsdp_version: 2 in Accelerate's configuration)"
)


def is_flat(parameter: Tensor) -> bool:
    """Return whether FSDP1 made this parameter part of a flat one, or made it from others."""
    return getattr(parameter, "_fsdp_flattened", False)


def refuse_partitioned(model: nn.Module) -> None:
    """Refuse a model of whose parameters DeepSpeed's ZeRO stage 3 holds parts.

    Raises:
        ConfigError: a parameter is not gathered.
    """
    for name, parameter in model.named_parameters():
        if getattr(parameter, "ds_numel", parameter.numel()) != parameter.numel():
            raise ConfigError(
                f"{name}: DeepSpeed's ZeRO stage 3 holds a part of it on each process; call this on every process, "
                "inside deepspeed.zero.GatheredParameters(list(model.parameters()))"
            )


def refuse_flat(name: str, weight: Tensor) -> None:
    """Refuse the view of a flat parameter that FSDP1 puts in a layer in place of its weight.

    Raises:
        ConfigError: the weight is such a view.
    """
    if getattr(weight._base, "_is_flat_param", False):
        raise ConfigError(f"{name}: its layer is in a {FSDP1}")
