"""Arguments with which a file is compared with its model."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nmcompile.arguments import Args, Kwargs


@dataclass(frozen=True)
class Example:
    """The arguments of one call."""

    args: Args
    kwargs: Kwargs = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        """Return the tensors in the order of the file's inputs: those in `args`, then those in `kwargs`."""
        return [x for x in pytree.tree_leaves((self.args, dict(self.kwargs))) if isinstance(x, Tensor)]

    def run(self, model: nn.Module) -> object:
        """Return the model's result for these arguments."""
        return model(*self.args, **self.kwargs)

    def changed(self, tensors: Iterable[Tensor]) -> "Example":
        """Return the same call with other tensors, in the order of `tensors`."""
        given = iter(tensors)
        return Example(*pytree.tree_map_only(Tensor, lambda _: next(given), (self.args, dict(self.kwargs))))
