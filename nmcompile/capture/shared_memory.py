"""Memory that nodes of a graph may share: views and in-place operations."""

from collections.abc import Iterable

from torch import fx, nn

from nmcompile.capture.sites import is_layer
from nmcompile.capture.writes import written

# Names as in `ranges`. Operators not listed here, above all views, may return the memory of any input.
FRESH = {
    "linear", "linearinout", "addmm", "mm", "bmm", "baddbmm", "matmul", "conv1d", "conv2d", "conv3d", "convolution",
    "embedding",
    "convtranspose1d", "convtranspose2d", "convtranspose3d", "scaleddotproductattention", "batchnorm", "syncbatchnorm",
    "layernorm", "groupnorm", "rmsnorm", "localresponsenorm", "add", "iadd", "sub", "isub", "rsub", "mul", "imul",
    "div", "truediv", "itruediv", "neg", "pow", "ipow", "abs", "absolute", "square", "exp", "log", "sqrt", "rsqrt",
    "sigmoid", "tanh", "relu", "relu6", "gelu", "silu", "elu", "celu", "selu", "mish", "leakyrelu", "prelu",
    "hardswish", "hardsigmoid", "hardtanh", "softplus", "softsign", "logsigmoid", "clamp", "clip", "clampmin",
    "clampmax", "maximum", "minimum", "where", "maskedfill", "copy", "fill", "zero", "softmax", "softmax2d",
    "logsoftmax", "mean", "sum", "cat", "concat", "concatenate", "stack", "clone", "repeat", "interpolate", "upsample",
    "upsamplenearest2d", "upsamplebilinear2d", "pad", "constantpadnd", "eq", "ne", "lt", "le", "gt", "ge", "size",
    "dim", "numel", "symsize",
    *(f"{kind}norm{dims}d" for kind in ("batch", "instance") for dims in (1, 2, 3)),
    *(f"{kind}pad{dims}d" for kind in ("zero", "constant", "reflection", "replication") for dims in (1, 2, 3)),
    *(f"{kind}pool{dims}d" for kind in ("max", "avg", "adaptivemax", "adaptiveavg") for dims in (1, 2, 3)),
}  # fmt: skip
"""Operators whose result is new memory or, in place, the memory that they write to."""


class SharedMemory:
    """Sets of nodes that may share memory, grown in graph order."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.groups: dict[fx.Node, set[fx.Node]] = {}
        self.attributes: dict[str, fx.Node] = {}

    def add(self, node: fx.Node, name: str) -> None:
        """Add the next node; `name` is the name of its operator, as in `FRESH`."""
        group = self.groups[node] = {node}
        for other in self._sources(node, name):
            small, large = sorted((group, self.groups[other]), key=len)
            if small is not large:
                large |= small
                self.groups.update(dict.fromkeys(small, large))
            group = large

    def behind(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """Return every node that may share memory with one of `nodes`."""
        return set[fx.Node]().union(*(self.groups[node] for node in nodes))

    def _sources(self, node: fx.Node, name: str) -> list[fx.Node]:
        if node.op == "get_attr":
            return [self.attributes.setdefault(str(node.target), node)]
        is_layer_call = node.op == "call_module" and is_layer(self.model.get_submodule(str(node.target)))
        return written(self.model, node) if name in FRESH or is_layer_call else node.all_input_nodes
