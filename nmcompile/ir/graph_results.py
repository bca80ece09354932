"""Results of one of the three graphs."""

from torch import fx


def results_of(graph: fx.Graph) -> tuple[fx.Node | None, ...]:
    """Return the values that a graph returns, which are its nodes or None."""
    (results,) = graph.output_node().args
    assert isinstance(results, tuple | list)
    return tuple(result if isinstance(result, fx.Node) else None for result in results)
