"""The mask of one weight: derived state, rebuilt by the first forward after it became stale."""

import copy
import itertools
import warnings
import weakref
from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from nmcompile import pruning
from nmcompile.ir.layers import Layer
from nmcompile.ir.shards import gathered, is_sharded, refuse_flat
from nmcompile.printable import printable
from nmcompile.pruning import NMPattern

NEVER_SEEN = -1
STALE, VERSION, ADDRESS = 0, 1, 2
SILENT_BACKWARDS = 1000

_serials = itertools.count()
live_masks: "weakref.WeakSet[WeightMask]" = weakref.WeakSet()
"""Every mask in the process: the optimizer hooks look here for the weights that a step changed."""


class WeightMask:
    """The current mask of one weight, shared by the layers that share the weight.

    It becomes stale by an optimizer step (every `refresh`-th), by `load_state_dict`, and by any write to the weight
    that no optimizer step explains, such as an EMA update. Not seen are writes to what a weight is computed from (a
    parametrization), to the elements of `.data` or of shards (FSDP2), and another parameter in its place: compile again
    after such. The mask itself, its step count and whether it is stale are what `sparse_state_dict` keeps.

    Args:
        name: the weight's name.
        layer: which dims of the weight are out and in, and its groups.
        operator: `greedy` (row-wise), `transposable` or `transposable_greedy`.
        pattern: N:M.
        refresh: optimizer steps between two computations, None to keep the first mask.
        sr_ste: SR-STE's λ.
        weight: for shape and device of the mask.
        kernel: what a backend computes a transposable mask with, see `compute_mask`; empty for the reference.
    """

    def __init__(
        self,
        name: str,
        layer: Layer,
        operator: str,
        pattern: NMPattern,
        refresh: int | None,
        sr_ste: float,
        weight: Tensor,
        kernel: str = "",
    ) -> None:
        self.name = name
        self.layer = layer
        self.operator = operator
        self.pattern = pattern
        self.refresh = refresh
        self.sr_ste = sr_ste
        self.kernel = kernel
        self.serial = next(_serials)  # A later compilation of the same weight has a higher one.
        self.steps = 0
        self.backwards = 0
        self.is_decayed = False  # by SR-STE, for the step that is being made
        self.is_resumed = False  # with weights that sparse training may have made, and without its state
        self.accepted: int | None = None  # The id of the parameter whose version and address the clock has.
        # Whole also where the weight is a shard; else with its strides.
        like = torch.empty(weight.shape, device=weight.device) if is_sharded(weight) else weight
        self.tensor = torch.zeros_like(like, dtype=torch.bool, requires_grad=False)
        # On the CPU, and a tensor: a compiled step reads and resets it without being compiled again.
        self.clock = torch.tensor([1, NEVER_SEEN, 0])
        self.owners: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()
        live_masks.add(self)

    def current(self, weight: Tensor) -> Tensor:
        """The mask, rebuilt from `weight` (bool, its shape) if it is stale."""
        if self.tensor.device != weight.device:
            self.tensor = self.tensor.to(weight.device)
        if not torch.compiler.is_compiling():
            if type(weight) is not nn.Parameter:
                refuse_flat(self.name, weight)
            self.notice_write()
        # Not for nothing: a call counts as a write to a mask that an earlier forward may have saved for its backward.
        if torch.compiler.is_compiling() or int(self.clock[STALE]):
            how = self.operator, str(self.pattern), self.layer.out_dim, self.layer.in_dim, self.layer.groups
            refresh_mask(gathered(weight), self.tensor, self.clock, *how, self.kernel)
        return self.tensor

    def preview(self, weight: Tensor) -> Tensor:
        """Compute the mask that `current` would return, and leave the state as it is."""
        if not int(self.clock[STALE]) and not self.was_written():
            return self.tensor.to(weight.device)
        layer = self.layer
        return compute_mask(weight, self.operator, self.pattern, layer.out_dim, layer.in_dim, layer.groups, self.kernel)

    def notice_write(self) -> None:
        """Become stale if the weight was written since it was last accepted."""
        if not self.was_written():
            return
        if self.backwards:
            self._warn("its weight changed after backward")
        self.mark_stale()

    def note_backward(self) -> None:
        """Count a backward call, to notice an optimizer whose steps nobody sees."""
        self.backwards += 1
        self.is_decayed = False
        if self.backwards == SILENT_BACKWARDS and self.refresh is not None:
            self._warn(f"{SILENT_BACKWARDS} backward calls")

    def note_load(self, steps: int) -> None:
        """Become stale, since `load_state_dict` has written the weight, which `steps` steps of sparse training made."""
        self.is_resumed = self.steps == 0 and steps > 0
        self.mark_stale()

    def _warn(self, evidence: str) -> None:
        self.backwards = 0
        warnings.warn(
            f"{printable(self.name)}: {evidence} and no optimizer step was seen, so its mask does not follow the "
            "refresh period. If the optimizer is not a torch.optim.Optimizer, call nmcompile.training.step(model) "
            "after each step.",
            stacklevel=3,
        )

    def mark_stale(self) -> None:
        """Have the next forward rebuild the mask from the weight as it is then."""
        self.clock[STALE] = 1
        self.accept_version()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that the weight is made of, as they are registered now (sharded ones under FSDP2)."""
        for owner, path in self.owners.items():
            if path is None:
                yield from owner.parameters()
            elif isinstance(weight := reduce(getattr, path.split("."), owner), nn.Parameter):
                yield weight

    @property
    def is_computed(self) -> bool:
        """Whether the weight is no tensor of its own, but computed from others in forward."""
        return None in self.owners.values()

    def weight(self) -> nn.Parameter | None:
        """The parameter that is the weight, or None where the weight is computed from others."""
        return None if self.is_computed else next(self.parameters(), None)

    def accept_version(self) -> None:
        """Take the weight as it is now for known: a later write that no step explains makes the mask stale."""
        self._accept(self.weight())

    def _accept(self, weight: nn.Parameter | None) -> None:
        # A sharded parameter is not the tensor that forward sees, so its version says nothing.
        if type(weight) is not nn.Parameter or weight.is_inference():
            self.accepted = None
            self.clock[VERSION] = NEVER_SEEN
        else:
            self.accepted = id(weight)
            self.clock[VERSION], self.clock[ADDRESS] = weight._version, weight.data_ptr()

    def was_written(self) -> bool:
        """Whether the weight was written since it was last accepted."""
        weight = self.weight()
        # A shard, or what FSDP2 gathers from shards, is not the tensor whose version was accepted.
        if weight is None or id(weight) != self.accepted:
            return False
        # `weight.data = ...` changes the address and no version.
        return [weight._version, weight.data_ptr()] != self.clock[VERSION:].tolist()

    def after_step(self) -> None:
        """Count an optimizer step that may have changed the weight."""
        self.backwards = 0
        self.is_decayed = False
        self.steps += 1
        self.accept_version()
        if self.refresh is not None and self.steps % self.refresh == 0:
            self.mark_stale()

    def move(self, tensor: Tensor) -> None:
        """Put another tensor in the mask's place: the module moved to another device."""
        if self.tensor.is_meta and not tensor.is_meta:
            self.mark_stale()
        self.tensor = tensor.to(torch.bool)  # also where a module took another dtype
        self.accept_version()

    def __getstate__(self) -> dict[str, Any]:
        self.notice_write()
        return self.__dict__ | {"owners": list(self.owners.items())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        from nmcompile.training.steps import watch_optimizers  # which looks at the masks that are here

        self.__dict__.update(state | {"owners": weakref.WeakKeyDictionary(state["owners"])})
        self.clock[VERSION] = NEVER_SEEN
        self.accepted = None
        live_masks.add(self)
        watch_optimizers()  # in a process that has compiled nothing

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeightMask":
        replica = type(self).__new__(type(self))
        memo[id(self)] = replica
        replica.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        # The module that owns the copied parameter may not be complete yet.
        replica._accept(copy.deepcopy(self.weight(), memo))
        return replica


@torch.library.custom_op("nmcompile::refresh_mask", mutates_args=("mask", "clock"))
def refresh_mask(
    weight: Tensor,
    mask: Tensor,
    clock: Tensor,
    operator: str,
    pattern: str,
    out_dim: int,
    in_dim: int,
    groups: int,
    kernel: str,
) -> None:
    """Rebuild `mask` from `weight` if it is outdated."""
    if is_outdated(weight, clock):
        mask.copy_(compute_mask(weight, operator, NMPattern.parse(pattern), out_dim, in_dim, groups, kernel))
        clock[STALE] = 0
        if _tells_writes(weight, clock):
            clock[VERSION], clock[ADDRESS] = weight._version, weight.data_ptr()


refresh_mask.register_fake(lambda *args, **kwargs: None)


def is_outdated(weight: Tensor, clock: Tensor) -> bool:
    """Whether the clock of a mask says that it is stale, or that the weight was written unseen."""
    seen = [int(clock[VERSION]), int(clock[ADDRESS])]
    return bool(clock[STALE]) or (_tells_writes(weight, clock) and seen != [weight._version, weight.data_ptr()])


def _tells_writes(weight: Tensor, clock: Tensor) -> bool:
    """Whether version and address of this tensor tell of writes: inductor may hand a copy over, which counts from 0."""
    if weight.is_inference() or int(clock[VERSION]) == NEVER_SEEN:
        return False
    return weight._version > 0 or int(clock[ADDRESS]) == weight.data_ptr()


def compute_mask(
    weight: Tensor, operator: str, pattern: NMPattern, out_dim: int, in_dim: int, groups: int, kernel: str = ""
) -> Tensor:
    """The mask of a weight: row-wise along `in_dim`, or transposable over tiles of (out, in) that cross no group.

    `kernel` names an operator, `"namespace::name"`, that takes a weight, `out_dim` and `in_dim` and gives the mask that
    `operator` and `pattern` ask for. By name, since it has to be saved, and traced by `torch.compile`.
    """
    if operator == "greedy":
        return pruning.mask(weight, pattern, dim=in_dim)
    split = weight.unflatten(out_dim, (groups, -1))
    dims = out_dim + 1, in_dim + (in_dim > out_dim)
    if kernel:
        namespace, _, name = kernel.partition("::")
        mask: Tensor = getattr(getattr(torch.ops, namespace), name)(split, *dims)
    else:
        method = "exact" if operator == "transposable" else "greedy"
        mask = pruning.transposable_mask(split, pattern, dims=dims, method=method)
    return mask.flatten(out_dim, out_dim + 1)
