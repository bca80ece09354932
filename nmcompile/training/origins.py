"""The masks that a copied mask was copied from: an average of weights belongs under the mask they were trained with.

Copies of a model that is being trained mostly hold an average of its weights (EMA, SWA, target and teacher networks).
Nobody trains a pruned weight's magnitude, so magnitudes of averages rank weights that the model never used above those
that it did. So a copy that is written while the model is trained takes the model's mask.
"""

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from nmcompile.training.masks import WeightMask


class Origin(NamedTuple):
    """A mask that another one was copied from, and the optimizer steps that it had noted then.

    It is held, not only referenced weakly: a script may drop the model and keep the average.
    """

    mask: "WeightMask"
    notes: int

    @property
    def was_trained(self) -> bool:
        """Return whether an optimizer has stepped the origin's weight since."""
        return self.mask.notes > self.notes


Origins = tuple[Origin, ...]
"""The nearest first: the model that is trained may itself be a copy, whose origin is trained no more."""


def origins_of_copy(mask: "WeightMask") -> Origins:
    """Return the origins of a copy that is made now; those whose model is gone are not trained any more."""
    return Origin(mask, mask.notes), *(one for one in renewed(mask.origins) if one.mask.owners)


def renewed(origins: Origins) -> Origins:
    """Return the same origins as of now: steps so far do not explain what is written from now on."""
    return tuple(Origin(one.mask, one.mask.notes) for one in origins)


def followed_mask(origins: Origins) -> Tensor | None:
    """Return the present mask of the nearest origin that was trained since the copy; None if none was."""
    for mask in (origin.mask for origin in origins if origin.was_trained):
        weight = mask.weight()
        # Its next forward may rebuild it. That is for the model to do: looking at a copy changes no training.
        return mask.preview(weight) if type(weight) is nn.Parameter and not weight.is_meta else mask.tensor
    return None
