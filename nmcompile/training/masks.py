"""The mask of one weight: derived state, rebuilt by the first forward after it became stale."""

import copy
import itertools
import warnings
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from functools import reduce
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from nmcompile.config import STEADY
from nmcompile.fingerprint import fingerprint
from nmcompile.ir.found_mask import FoundMask
from nmcompile.ir.layers import Layer
from nmcompile.layer_config import TRANSPOSABLE
from nmcompile.printable import printable
from nmcompile.pruning.pattern import NMPattern
from nmcompile.sharded import gathered, is_sharded, refuse_flat
from nmcompile.training.mask_guard import guards_of
from nmcompile.training.optimizer_hooks import live_masks, watch_optimizers
from nmcompile.training.origins import Origins, followed_mask, origins_of_copy, renewed
from nmcompile.training.refresh_mask import NEVER, compute_mask, is_compared, refresh_mask, when_compared
from nmcompile.training.steady import discounted, period_of
from nmcompile.training.step_count import StepCount
from nmcompile.training.weight_clock import HOLDS, STEPPED, UNKNOWN, WRITTEN, WeightClock
from nmcompile.weight_cache import FROZEN, Content

SILENT_BACKWARDS = 1000  # without an optimizer step between them; then calls compare the weight again

_serials = itertools.count()


class WeightMask:
    """The current mask of one weight, shared by the layers that share the weight.

    It becomes stale by an optimizer step (one in each period), by `load_state_dict`, and by any write to the weight
    that no optimizer step explains. A copy that is written while the model it was copied from is trained, as an EMA is,
    takes that model's mask instead, until the copy is trained itself; see `nmcompile.training.origins`.

    Calls that do not train the weight compare its fingerprint, which shows every write; so do calls that train it until
    an optimizer is seen to step it. From then on, only its version counter and address are compared while it is
    trained. `sparse_state_dict` saves the mask itself, its step count and whether it is stale.

    Args:
        name: the weight's name.
        layer: which dims of the weight are out and in, and its groups.
        operator: `greedy` (row-wise), `transposable` or `transposable_greedy`.
        pattern: N:M.
        refresh: optimizer steps between two computations, `"steady"` for the rule of `nmcompile.training.steady`, None
            to keep the first mask.
        sr_ste: SR-STE's λ.
        weight: gives shape and device of the mask.
        kernel: the backend's kernel for the mask, see `compute_mask`; empty for the reference.
    """

    def __init__(
        self,
        name: str,
        layer: Layer,
        operator: str,
        pattern: NMPattern,
        refresh: int | str | None,
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
        self.counted = StepCount()
        self.notes = 0  # of optimizer steps, including those that turn out to have been skipped
        self.backwards = 0
        self.found: FoundMask | None = None
        self.is_decayed = False  # by SR-STE, for the step that is being made
        self.is_resumed = False  # with weights that sparse training may have made, and without its state
        # The full size, also if the weight is a shard; else with the weight's strides.
        like = torch.empty(weight.shape, device=weight.device) if is_sharded(weight) else weight
        self.tensor = torch.zeros_like(like, dtype=torch.bool, requires_grad=False)
        self.clock = WeightClock()
        self.guards = guards_of(self)
        self.owners: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()
        self.origins: Origins = ()
        live_masks.add(self)

    @property
    def is_transposable(self) -> bool:
        """Return whether the mask is N:M along out too."""
        return self.operator in TRANSPOSABLE

    def current(self, weight: Tensor, content: Content | None, is_trained: bool = False) -> Tensor:
        """Return the mask, rebuilt from `weight` (bool, its shape) if it is stale; see `MaskSource`.

        A weight other than the registered one gets a mask of its own, which is not cached.
        """
        if self.found is not None:
            if weight.is_meta and not self.tensor.is_meta:
                return self._own_mask(weight)
            self._fit(weight)
            return self.tensor
        if torch.compiler.is_compiling():
            return self._in_graph(weight, when_compared(weight, content, is_trained))
        if self.clock.still_holds(weight, content) and self.tensor.device == weight.device:
            return self.tensor
        if type(weight) is not nn.Parameter:
            refuse_flat(self.name, weight)
        if weight.is_meta or self._is_another(weight, content):
            return self._own_mask(weight)
        self._fit(weight)
        if content != FROZEN:
            self._notice(weight if self._is_registered(weight) else self.weight(), content)
        # Only when the mask is stale: each call counts as a write to a mask that an earlier forward may have saved.
        if self.clock.is_stale:
            self._refresh(weight, NEVER)
            self.clock.content = UNKNOWN if content is None or content == FROZEN else content
        return self.tensor

    def _in_graph(self, weight: Tensor, compares: int) -> Tensor:
        """Return the mask inside a graph that is being made, which will rebuild it only if no guard can."""
        is_parameter = torch.compiler.is_dynamo_compiling() and isinstance(weight, nn.Parameter)
        is_own = is_parameter and self._is_registered(weight)  # Dynamo compares no ids of computed tensors
        if is_own and weight.device == self.tensor.device and self.guards is not None:
            # Dynamo asks an object once the traced code has looked at it; the truth of a tuple would look at each.
            assert self.guards[compares] is not None
            return self.tensor
        self._fit(weight)
        self._refresh(weight, compares)
        return self.tensor

    def bring_up_to_date(self, compares: int) -> None:
        """Rebuild the mask as `current` does, before a graph reads it; nothing happens unless the weight is plain."""
        weight = self.weight()
        if type(weight) is nn.Parameter and not weight.is_meta and weight.device == self.tensor.device:
            self.current(weight, fingerprint(weight) if is_compared(compares, self.is_followed) else None)

    def _is_registered(self, weight: Tensor) -> TypeGuard[nn.Parameter]:
        """Return whether this is the parameter that was accepted last; asking its modules takes longer."""
        return id(weight) == self.clock.accepted

    def _refresh(self, weight: Tensor, compares: int) -> None:
        how = self.operator, str(self.pattern), self.layer.out_dim, self.layer.in_dim, self.layer.groups, self.kernel
        refresh_mask(gathered(weight), self.tensor, self.clock.hands, *how, self.is_steady, compares)

    def _fit(self, weight: Tensor) -> None:
        """Move the mask to the weight's device: a model is materialized, or loaded, in many ways."""
        if self.tensor.device == weight.device or weight.is_meta:
            return
        # A tensor made in inference mode could not be written outside of it.
        with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False):
            if self.tensor.is_meta:
                self.tensor = torch.zeros(self.tensor.shape, dtype=torch.bool, device=weight.device)
                self.clock.staleness = WRITTEN
            else:
                self.tensor = self.tensor.to(weight.device)

    def _is_another(self, weight: Tensor, content: Content | None) -> bool:
        """Return whether `torch.func.functional_call` or the like has replaced the weight by other values."""
        if content == FROZEN or self.clock.is_of(weight):
            return False
        if any(getattr(owner, "_is_fsdp_managed_module", False) for owner in self.owners):
            return False  # FSDP2 gathers the weight again for each call
        return not self.clock.has_content(weight, content)

    @torch.no_grad()
    def _own_mask(self, weight: Tensor) -> Tensor:
        if weight.is_meta:
            return torch.empty_like(weight, dtype=torch.bool)
        layer = self.layer
        how = self.operator, self.pattern, layer.out_dim, layer.in_dim, layer.groups, self.kernel
        return compute_mask(weight.detach(), *how)

    def preview(self, weight: Tensor) -> Tensor:
        """Compute the mask that `current` would return, and leave the state as it is."""
        if self.found is not None:
            return self.tensor.to(weight.device)
        content = fingerprint(weight)
        staleness = self.clock.staleness
        if self._is_another(weight, content):
            return self._own_mask(weight)
        if self.clock.is_written(self.weight(), content):
            if (followed := self._followed()) is not None:
                return followed.to(weight.device)
            staleness = WRITTEN
        if staleness == STEPPED and self.is_steady:
            return self._own_mask(discounted(weight, self.tensor.to(weight.device)))
        return self._own_mask(weight) if staleness else self.tensor.to(weight.device)

    def look(self) -> None:
        """Become stale if the weight was written since it was last accepted; its content is known from then on."""
        weight = self.weight()
        if weight is not None and not weight.is_meta:
            self._fit(weight)
        self._notice(weight, None if weight is None else fingerprint(weight))

    def _notice(self, weight: nn.Parameter | None, content: int | None) -> None:
        if not self.clock.notice(weight, content):
            return
        if (followed := self._followed()) is not None:
            self.tensor.copy_(followed)
            self.clock.staleness = HOLDS
            return
        if self.backwards and self.found is None:
            self._warn("its weight changed after backward")
        self.clock.staleness = WRITTEN

    def _followed(self) -> Tensor | None:
        """Return the mask that a written weight takes from its model if it is a copy, and not trained itself.

        A backward without a step says that it is trained by means that nobody sees.
        """
        return None if self.backwards or self.found else followed_mask(self.origins)

    def note_assignment(self) -> None:
        """Become stale if another parameter has replaced the weight."""
        weight = self.weight()
        if weight is not None and id(weight) != self.clock.accepted:
            self.origins = renewed(self.origins)
            self.mark_stale()

    def note_backward(self) -> None:
        """Count a backward call: after many without a step, the known optimizer counts as gone."""
        self.backwards += 1
        self.is_decayed = False
        if self.backwards == SILENT_BACKWARDS:
            self.clock.is_followed = False

    def note_load(self, steps: int) -> None:
        """Become stale, since `load_state_dict` has written the weight, which `steps` steps of sparse training made."""
        self.is_resumed = self.steps == 0 and steps > 0
        self.origins = renewed(self.origins)
        self.mark_stale()

    def _warn(self, evidence: str) -> None:
        self.backwards = 0
        warnings.warn(
            f"{printable(self.name)}: {evidence} and no optimizer step was seen, so its mask does not follow the "
            "refresh period. If the optimizer is not a torch.optim.Optimizer, call nmcompile.training.step(model) "
            "after each step.",
            stacklevel=3,
        )

    def stand(self, mask: Tensor, found: FoundMask) -> None:
        """Take a mask that was found from calibration data; it stands from now on."""
        self.tensor.copy_(mask)
        self.found = found
        self.accept_content()

    def mark_stale(self) -> None:
        """Make the next forward rebuild the mask from the weight as it is then."""
        self.clock.staleness = WRITTEN
        self.accept_version()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that the weight is made of, as they are registered now (sharded ones under FSDP2)."""
        for owner, path in self.owners.items():
            if path is None:
                yield from owner.parameters()
            elif isinstance(weight := reduce(getattr, path.split("."), owner), nn.Parameter):
                yield weight

    @property
    def is_computed(self) -> bool:
        """Return whether the weight is not a tensor of its own, but computed from others in forward."""
        return None in self.owners.values()

    def weight(self) -> nn.Parameter | None:
        """Return the parameter that is the weight, or None if the weight is computed from others."""
        return None if self.is_computed else next(self.parameters(), None)

    @property
    def is_stale(self) -> bool:
        """Return whether the next `current` rebuilds the mask."""
        return self.found is None and self.clock.is_stale

    @property
    def is_steady(self) -> bool:
        """Return whether the mask is rebuilt from what it was."""
        return self.refresh == STEADY

    @property
    def is_followed(self) -> bool:
        """Return whether an optimizer is known to step the weight: then calls that train it need no fingerprint."""
        return self.clock.is_followed

    def accept_version(self, content: int = UNKNOWN) -> None:
        """Accept the present weight as known; see `WeightClock.accept`."""
        self.clock.accept(self.weight(), content)

    def accept_content(self) -> None:
        """Accept the present weight as known, down to the last bit."""
        self.clock.accept_content(self.weight())

    def was_moved(self) -> bool:
        """Return whether the weight has another version or address than when it was last accepted."""
        return self.clock.was_moved(self.weight())

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps that may have changed the weight."""
        return self.counted.read()

    @steps.setter
    def steps(self, count: int) -> None:
        self.counted = StepCount(count)

    def after_step(self, found_inf: Tensor | None = None) -> None:
        """Count an optimizer step that may have changed the weight.

        `found_inf` is not zero if a GradScaler made a fused optimizer skip the step. On a GPU it is read only if the
        step may make the mask stale.
        """
        weight, accepted = self.weight(), self.clock.accepted
        is_replaced = accepted is not None and type(weight) is nn.Parameter and id(weight) != accepted
        self.backwards = 0
        self.is_decayed = False
        self.notes += 1
        self.origins = ()
        self.clock.accept(weight)
        self.clock.is_followed = True
        if self.counted.add(found_inf, period_of(self.refresh)):
            self.clock.expire()
        if is_replaced:
            self.clock.staleness = WRITTEN

    def move(self, tensor: Tensor) -> None:
        """Replace the mask's tensor: the module moved to another device, or took another dtype.

        The values of `tensor` are not used: `to_empty` leaves them uninitialized.
        """
        if not tensor.is_meta:
            moved = tensor.to(torch.bool)
            if self.tensor.is_meta:
                moved.zero_()
                self.clock.staleness = WRITTEN
            elif moved is not self.tensor:
                moved.copy_(self.tensor)
            self.tensor = moved
        self.accept_content()

    def __getstate__(self) -> dict[str, object]:
        self.look()
        state = self.__dict__ | {"owners": list(self.owners.items()), "guards": None}
        del state["origins"]  # of this process
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"owners": weakref.WeakKeyDictionary(state["owners"]), "origins": ()})
        self.clock.start_anew()
        self.guards = guards_of(self)
        live_masks.add(self)
        watch_optimizers()  # in a process that has compiled nothing

    def __deepcopy__(self, memo: dict[int, object]) -> "WeightMask":
        replica = type(self).__new__(type(self))
        memo[id(self)] = replica
        replica.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        replica.origins, replica.backwards = origins_of_copy(self), 0
        # The module that owns the copied parameter may not be complete yet.
        replica.clock.accept(copy.deepcopy(self.weight(), memo), replica.clock.content)
        return replica
