"""Results of one of the three graphs: a tuple of nodes."""

from collections.abc import Iterable

from torch import fx


def results_of(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that a graph returns."""
    (results,) = graph.output_node().args
    assert isinstance(results, tuple | list)
    return [result for result in results if isinstance(result, fx.Node)]


def set_results(graph: fx.Graph, results: Iterable[fx.Node]) -> None:
    """Let a graph return other nodes."""
    graph.output_node().args = (tuple(results),)
