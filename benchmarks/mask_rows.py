"""The rows of the benchmark of masks: every method with every pattern on every model, in two orders of channels.

CRAFT in full precision has three methods only: to solve for the weights of its convolutions takes ten minutes a row.
"""

from dataclasses import dataclass
from itertools import product

from nmcompile import CompileConfig, NMPattern
from nmcompile.layer_config import LayerConfig, Pruning

LANGUAGE_MODEL, EMBEDDINGS, SCORE_MAPS = "SmolLM2-135M", "all-MiniLM-L6-v2", "CRAFT"
METHODS = (
    ("magnitude", False),
    ("wanda", False),
    ("wanda", True),
    ("sparsegpt", False),
    ("sparsegpt", True),
    ("admm", False),  # its weights are refitted in any case
)
INFERENCE = "2:4, 4:8 inputs, 4-bit"
PATTERNS = {
    LANGUAGE_MODEL: ("2:4", "2:4 transposable", "4:8"),
    EMBEDDINGS: ("2:4", "2:4 transposable", "4:8"),
    SCORE_MAPS: (INFERENCE,),
}
FULL_PRECISION = ("2:4", "2:4 transposable")
FOUR_OF_EIGHT = {"_default": LayerConfig(weight=Pruning("greedy", NMPattern(4, 8)))}


@dataclass(frozen=True)
class Row:
    """One way to prune one model.

    Args:
        model: by name.
        pattern: one of the model's `PATTERNS`.
        masks, refit, permute: as `CompileConfig` takes them.
    """

    model: str
    pattern: str
    masks: str
    refit: bool
    permute: bool

    @property
    def method(self) -> str:
        """Return the method in words."""
        return "permuted, " * self.permute + self.masks + " + refit" * self.refit

    @property
    def name(self) -> str:
        return f"{self.model}, {self.pattern}, {self.method}"

    @property
    def mode(self) -> str:
        return {INFERENCE: "inference", "2:4 transposable": "t-weights"}.get(self.pattern, "weights")

    @property
    def config(self) -> CompileConfig:
        """Return how masks are found, once the channels are in their order."""
        return CompileConfig(layers=self._layers, masks=self.masks, refit=self.refit)

    @property
    def order(self) -> CompileConfig:
        """Return how the order of the channels is found."""
        return CompileConfig(layers=self._layers, permute=self.permute)

    @property
    def _layers(self) -> dict[str, LayerConfig | None]:
        return dict(FOUR_OF_EIGHT) if self.pattern == "4:8" else {}


ROWS = [
    Row(model, pattern, masks, refit, permute)
    for permute, (masks, refit), model in product((False, True), METHODS, PATTERNS)
    for pattern in PATTERNS[model]
] + [
    Row(SCORE_MAPS, pattern, masks, refit=False, permute=False)
    for masks, pattern in product(("magnitude", "wanda", "sparsegpt"), FULL_PRECISION)
]
