"""Table 3: gradients and transposable weights, sparse at once in all three GEMMs (Section 6.2).

The paper trains as Hubara et al. (2021) do: at full scale, masks are recomputed every 40 steps. A run at quick scale
has about 240 steps, and masks follow the weights by the default rule. The paper's text lacks the last row of ResNet-50.
"""

from dataclasses import replace

from nmcompile.paper.comparison import Comparison, Row, Setting
from nmcompile.paper.methods import Refresh, plain, weights_and_gradients
from nmcompile.paper.recipe import PAPER, QUICK

HUBARA = replace(PAPER, epochs=120, rate=0.2, decay=5e-5, schedule="cosine")
HUBARAS_REFRESH = 40


def rows(name: str, network: str, papers: tuple[float | None, ...], refresh: Refresh) -> tuple[Row, ...]:
    """Return the rows of one network: dense, and W 2:4 with dense, 1:2, approx 2:4 and exact 2:4 gradients."""
    dense, one_of_two, approximate, exact = (
        weights_and_gradients(operator, pattern, refresh)
        for operator, pattern in ((None, None), ("mvue", "1:2"), ("mvue_approx", "2:4"), ("mvue", "2:4"))
    )
    return (
        Row(f"{name}: dense", plain, papers[0], network=network),
        Row(f"{name}: W 2:4", dense, papers[1], network=network),
        Row(f"{name}: W 2:4, G 1:2", one_of_two, papers[2], network=network),
        Row(f"{name}: W 2:4, G approx 2:4", approximate, papers[3], network=network),
        Row(f"{name}: W 2:4, G exact 2:4", exact, network=network),
    )


def both(r18: str, r50: str, refresh: Refresh) -> tuple[Row, ...]:
    """Return the rows of both networks with the paper's figures."""
    return (
        *rows("R18", r18, (70.6, 70.5, 70.4, 70.6), refresh),
        *rows("R50", r50, (77.2, 77.1, 75.6, None), refresh),
    )


EXPERIMENT = Comparison(
    name="table3",
    title="Table 3: MVUE gradients with transposable 2:4 weights",
    settings={
        "quick": Setting("images", "small", QUICK, both("small", "small-bottleneck", refresh="steady")),
        "full": Setting("imagenet", "resnet18", HUBARA, both("resnet18", "resnet50", HUBARAS_REFRESH)),
    },
    orders=tuple((f"{name}: W 2:4, G exact 2:4", f"{name}: W 2:4") for name in ("R18", "R50")),
    caption=(
        "Test accuracy (%) with transposable 2:4 weights (W) and MVUE gradients (G); differences are from the dense "
        "network of the same kind: R18 has basic blocks, R50 bottleneck blocks. "
        "The paper: ResNet-18 and ResNet-50 on ImageNet."
    ),
)
