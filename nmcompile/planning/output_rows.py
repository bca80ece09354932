"""Decisions on how a result is pruned and quantized where it is computed: at the ReLU or the norm after a layer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from nmcompile.config import CompileConfig, Phase
from nmcompile.ir.captured import Captured, Site
from nmcompile.ir.layers import Layer
from nmcompile.ir.plan import EIGHT, PlanRow
from nmcompile.layer_config import LayerConfig
from nmcompile.quantization import Grid

FEWEST = 5  # bits of results that are added in integers; with fewer, rounding would cost more than the float addition


@dataclass(frozen=True)
class OutputPlanner:
    """A planner of rows for the results of layers, which may themselves be dense."""

    captured: Captured
    default: LayerConfig
    config: CompileConfig

    def asked(self, site: Site) -> tuple[str | None, LayerConfig | None]:
        """Return the key of the config that applies to a layer, and the config of the layer."""
        return self.config.lookup(site.layer.name, site.weight) or (None, self.default)

    def rows(self, site: Site) -> Iterator[PlanRow]:
        """Plan what `placement="activation"` prunes and quantizes at the ReLU after a layer."""
        layer, (_, asked) = site.layer, self.asked(site)
        if self.config.placement == "operand" or asked is None or not self.captured.facts[layer.name].rectified:
            return
        if layer.name in self.captured.bypassed:
            return
        pruning = asked.input
        if pruning is not None and layer.out_features % pruning.pattern.block:
            reason = (
                f"its output is not pruned: {layer.out_features} channels are not a multiple of {pruning.pattern.block}"
            )
            yield PlanRow(layer.name, Phase.FORWARD, reason=reason)
        elif pruning is not None:
            yield PlanRow(layer.name, Phase.FORWARD, "output", pruning.operator, pruning.pattern, "out")
        if asked.input_bits is not None:
            grid = Grid(asked.input_bits, signed=False)
            yield PlanRow(layer.name, Phase.FORWARD, "output", self.config.clip, grid=grid)

    def reach(self, layer: Layer) -> bool:
        """Return whether every source of the layer's input is pruned and quantized at its ReLU."""
        sources = self.captured.facts[layer.name].sources
        sites = [site for site in self.captured.sites if site.layer.name in sources]
        if not sources or len(sites) != len(sources):
            return False
        return all(any(row.operand == "output" for row in self.rows(site)) for site in sites)

    def result_rows(self, layer: Layer, planned: list[PlanRow], is_integer: Callable[[str], bool]) -> Iterator[PlanRow]:
        """Plan the 8-bit grid of a quantized layer whose result is also read by anything other than quantized layers.

        It comes after the ReLU that directly follows, where it takes half of a signed grid, so one grid serves runtimes
        with and without unsigned integers; else it comes after the norm. Results that are added or concatenated share
        one step, if all of them are quantized layers' (`is_integer`), and have so few bits that the sums fit into 8.
        """
        if any(row.operand == "output" for row in planned):
            return
        facts = self.captured.facts[layer.name]
        operator = "mse" if self.config.clip == "pact" else self.config.clip  # 8 bits need no learned clip
        row = PlanRow(layer.name, Phase.FORWARD, "output", operator)
        bits = 0 if facts.stream is None else min(EIGHT, (facts.stream.room + 1).bit_length())
        if facts.stream is not None and bits >= FEWEST and all(map(is_integer, facts.stream.layers)):
            yield replace(row, grid=Grid(bits, signed=True), stream=facts.stream.layers)
        else:
            yield replace(row, grid=Grid(7, signed=False) if facts.rectified else Grid(8, signed=True))
