"""The result of capture, from which the planner works: where each layer is, and what is known about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from nmcompile.ir.layers import Layer


@dataclass(frozen=True)
class Site:
    """Place where a conv/linear node runs.

    Args:
        layer: the node's geometry; its name is the module's, or the weight parameter's for a functional call.
        module: name of the module whose forward runs the node.
        role: `""` if the module itself is the layer; the fx node's name for a functional call in the module's forward;
            the attribute of the weight where Python code multiplies by it; `"in_proj"`, `"q_proj"`, `"k_proj"`,
            `"v_proj"` or `"out_proj"` in `nn.MultiheadAttention`; the weight's attribute in a recurrent module.
        weight: full name of the weight. It is the parameter's name; for a computed weight `<module>.weight`, or the
            module's and the fx node's name for a functional call.
        is_expression: whether the weight is computed in forward (a parametrization, a standardized weight).
    """

    layer: Layer
    module: str
    role: str
    weight: str
    is_expression: bool = False


@dataclass(frozen=True)
class Stream:
    """Layers whose results are added or concatenated.

    Args:
        layers: their names.
        room: the steps that each result may reach, if all have the same step and every sum is to fit into 8 bits.
    """

    layers: tuple[str, ...]
    room: int


@dataclass(frozen=True)
class Facts:
    """Results of the data-flow analysis of one layer.

    Args:
        first, last: whether it is an end of the model.
        nonnegative: whether its input is proven non-negative.
        positions: output positions of one example run (tokens, or samples times pixels), None without shapes.
        rectified: whether every reader of its output is a ReLU.
        sources: the layers whose outputs its input is computed from, and `""` for anything else before it (a model
            input, an embedding); empty if nothing is known.
        norm: the batch norm, called once, that alone reads its output; `""` if there is none.
        readers: the layers that its output (after the norm) reaches only through ReLUs, max-pooling and views, and `""`
            for any other operator; empty if nothing is known, or if the model returns it.
        stream: the layers to whose results its output (after the norm) is added or concatenated, if there are any.
    """

    first: bool = False
    last: bool = False
    nonnegative: bool = False
    positions: int | None = None
    rectified: bool = False
    sources: frozenset[str] = frozenset()
    norm: str = ""
    readers: frozenset[str] = frozenset()
    stream: Stream | None = None


@dataclass(frozen=True)
class WholeGraph:
    """One graph of the whole model.

    Args:
        graph: the fx graph.
        layers: each node that is (or holds) layers, with their names.
        source: `"fx"` or `"export"`.
        constants: the full name of each placeholder's parameter or buffer, by the placeholder's name.
        norms: the nodes that are a batch norm, with the module's name.
        products: the nodes that multiply by a parameter and are not a layer.
        shapes: the shape of each node's tensor in the example; one for each tensor of a tuple.
        modules: the name of the module whose code made the node.
    """

    graph: fx.Graph
    layers: Mapping[fx.Node, tuple[str, ...]]
    source: str
    constants: Mapping[str, str] = field(default_factory=dict)
    norms: Mapping[fx.Node, str] = field(default_factory=dict)
    products: frozenset[fx.Node] = frozenset()
    shapes: Mapping[fx.Node, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    modules: Mapping[fx.Node, str] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, object]) -> "WholeGraph":
        # Read-only, and its keys are nodes: copies of a model share it.
        return self


@dataclass(frozen=True)
class Captured:
    """A model as the compiler sees it.

    Args:
        sites: every conv/linear node that can become three GEMMs.
        facts: by layer name.
        skipped: by module name, conv/linear-like modules that are not a GEMM node, with the reason.
        python: by module name, modules whose forward stays Python although it holds functional layers, or whose code
            could not be traced, with the reason.
        uncaptured: by module name, the parameters that the code in `skipped` and `python` multiplies by.
        parameters: the shape of every parameter of the model, by name.
        behind: by layer name, the parameters that its weight is, or is computed from.
        bypassed: by layer name, the code that reads the layer's weight without calling the layer.
        suspected: by layer name, code that may read the layer's weight without calling it; a run shows whether it does.
        tied: by layer name, the embedding that owns the same weight.
        adapters: the layers that PEFT or similar libraries added to the model's own.
        recurrent: the layers that are weights of torch's recurrent modules.
        traces: by module name, the graph from which forward is generated (modules with functional sites only).
        routes: by name of a module whose Python code multiplies by weights of layers, the layers by name of the weight.
        untraced: those of these modules whose code no graph takes whole.
        by_hand: by name of a module, its methods that may multiply by weights of layers as no graph or route shows; for
            each the layers, by name of the weight in the module.
        whole: the whole model's graph, or None.
        whole_reason: why there is no whole graph.
        carried: by weight, for layers that carry a mask of an earlier compilation, the fields of `LayerConfig` that it
            gave them.
    """

    sites: tuple[Site, ...]
    facts: Mapping[str, Facts]
    skipped: Mapping[str, str] = field(default_factory=dict)
    python: Mapping[str, str] = field(default_factory=dict)
    uncaptured: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    behind: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    bypassed: Mapping[str, str] = field(default_factory=dict)
    suspected: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    adapters: frozenset[str] = frozenset()
    recurrent: frozenset[str] = frozenset()
    traces: Mapping[str, fx.Graph] = field(default_factory=dict)
    routes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    untraced: frozenset[str] = frozenset()
    by_hand: Mapping[str, Mapping[str, Mapping[str, str]]] = field(default_factory=dict)
    whole: WholeGraph | None = None
    whole_reason: str = ""
    carried: Mapping[str, frozenset[str]] = field(default_factory=dict)
