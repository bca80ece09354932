"""The layers behind a result, if nothing between them and it minds that it is rounded to their grid at once."""

from collections.abc import Mapping

import torch
from torch import fx

from nmcompile.export.deployed_layer import DeployedActivation
from nmcompile.runtime.layers import RuntimeLayer

aten = torch.ops.aten
# Rounding to a grid and these commute: each keeps an element, moves it, or puts a bound in its place.
PASSED = frozenset({
    aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default,
    aten.clamp_max.default, aten.max_pool2d.default, aten.view.default, aten.reshape.default, aten.flatten.using_ints,
    aten.clone.default, aten.contiguous.default,
})  # fmt: skip


def grid_of_readers(end: fx.Node, layers: Mapping[fx.Node, RuntimeLayer]) -> DeployedActivation | None:
    """Return the one grid on which all readers of a result put it; None if there is another reader.

    Args:
        layers: by their conv or linear node.
    """
    found, waiting = set[DeployedActivation](), [end]
    while waiting:
        node = waiting.pop()
        for user in node.users:
            input = layers[user].deployed.input if user in layers and user.args[0] is node else None
            if input is not None and input.grid is not None:
                found.add(DeployedActivation(None, input.grid, input.scale))
            elif user.target in PASSED and len(user.all_input_nodes) == 1:
                waiting.append(user)
            else:
                return None
    return found.pop() if len(found) == 1 else None
