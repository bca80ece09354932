"""Decisions, layer by layer and phase by phase, on what is pruned, with a reason if nothing is.

The plan follows from the captured model and the configuration only, never from a clock, so every rank, every machine
and every resumed run plans the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property

from nmcompile.config import DEFAULT, CompileConfig, Phase
from nmcompile.errors import PreconditionError
from nmcompile.ir.captured import Captured, Site
from nmcompile.ir.layers import ConvTransposeLayer, Layer
from nmcompile.ir.plan import EIGHT, LayerPlan, Plan, PlanRow
from nmcompile.layer_config import LayerConfig, Pruning
from nmcompile.planning.operand_rows import OperandPlanner, dense_row
from nmcompile.planning.output_rows import OutputPlanner

NOT_ASKED = "the mode leaves this GEMM dense"
FIRST = "first layer, not pruned (paper §6.1); CompileConfig(ends='sparse') changes that"
LAST = "last linear, not pruned (paper §6.4); CompileConfig(ends='sparse') changes that"
TIED = "its weight is tied to the embedding"
ADAPTER = "adapter, not pruned; CompileConfig(layers=...) with its name changes that"
RECURRENT = (
    "recurrent layer: its GEMMs run in one fused kernel; CompileConfig(layers=...) with its name prunes them and runs "
    "each step by itself"
)
DEPTHWISE = "depthwise convolution: one in-channel per group leaves nothing to prune along"
UNREACHED = "calibration ran the model without calling it"
CARRIES = "but an earlier compilation gave it a mask, which it keeps; decompile first to plan it again"
DROPPED = "the mask that an earlier compilation gave it is dropped"


def plan_phases(captured: Captured, default: LayerConfig, config: CompileConfig) -> Plan:
    """Plan a captured model.

    Args:
        captured: sites and facts.
        default: the mode's config, for layers that `config` does not name.
        config: overrides by layer name; a layer that it names exactly must fit its pattern.

    Raises:
        ConfigError: a key of `config.layers` that names no layer.
        PreconditionError: a layer named exactly cannot take its config; or activations are to be pruned where they are
            computed, and no graph says where that is.
    """
    if config.placement == "activation" and captured.whole is None:
        raise PreconditionError(
            f"placement='activation' needs the whole graph of the model, and there is none ({captured.whole_reason}); "
            "pass args=, or take placement='operand'"
        )
    config.check_names((site.layer.name, site.weight) for site in captured.sites)
    return Plan(tuple(_LayerPlanner(captured, default, config, site).plan() for site in captured.sites))


@dataclass(frozen=True)
class _LayerPlanner:
    captured: Captured
    default: LayerConfig
    config: CompileConfig
    site: Site

    @property
    def layer(self) -> Layer:
        return self.site.layer

    @cached_property
    def outputs(self) -> OutputPlanner:
        return OutputPlanner(self.captured, self.default, self.config)

    @cached_property
    def operands(self) -> OperandPlanner:
        is_nonnegative = self.captured.facts[self.layer.name].nonnegative
        return OperandPlanner(self.layer, is_nonnegative, self.outputs.reach(self.layer))

    def plan(self) -> LayerPlan:
        key, given = self.outputs.asked(self.site)
        asked, reason = self._judge(key, given)
        if asked is None:
            rows = [dense_row(self.layer, phase, reason) for phase in Phase]
        else:
            assert given is not None
            rows = [row for phase in Phase for row in self._phase_rows(phase, asked, given, reason)]
            rows += self.operands.grid_rows(asked, self.config.clip, self.config.granularity)
        rows = self._mention_mask(given, asked, reason, rows) + list(self.outputs.rows(self.site))
        self._check_exact(key, asked or given, rows)
        is_integer = {"weight", "input"} <= {row.operand for row in rows if row.is_quantized}
        if is_integer and self.config.outputs == "int8" and not self._is_read_as_integers():
            rows += self.outputs.result_rows(self.layer, rows, self._is_integer)
        rewrites_all = asked == LayerConfig()
        changed = any(row.is_sparse or row.is_quantized for row in rows)
        # Export finds integer kernels for modules only; a functional call or attention keeps its bias and norm. So does
        # a transposed convolution, for which ONNX Runtime has none.
        is_module = is_integer and not self.site.role and not isinstance(self.layer, ConvTransposeLayer)
        norm = self.captured.facts[self.layer.name].norm if is_module else ""
        return LayerPlan(self.layer, tuple(rows), rewrites_all or changed, norm, is_module and self.layer.has_bias)

    def _judge(self, key: str | None, given: LayerConfig | None) -> tuple[LayerConfig | None, str]:
        """Return the config that the layer really gets, None if it stays unchanged, and the reason for that."""
        reason = self._dense_reason(given, key not in (None, DEFAULT))
        if not reason or given is None:
            return given, reason
        asked = self._carried_config(given, reason)
        is_stored = self.config.ends == "int8" and reason in (FIRST, LAST, DEPTHWISE) and given.weight_bits is not None
        return _in_eight_bits(asked, given) if is_stored else asked, reason

    def _carried_config(self, given: LayerConfig, reason: str) -> LayerConfig | None:
        """Return what is left of a config that does not apply: the part whose mask the layer carries, or None."""
        is_unreached = reason == f"bypassed: {UNREACHED}"
        stays = reason in (FIRST, LAST, ADAPTER) or reason.startswith(TIED) or is_unreached
        if not (stays and self._carries_mask(given)):
            return None
        # Without data there are no clips for quantizing activations.
        carried = self.captured.carried[self.site.weight] - ({"input", "input_bits"} if is_unreached else set())
        return replace(given, **{one.name: None for one in fields(given) if one.name not in carried})

    def _carries_mask(self, given: LayerConfig | None) -> bool:
        """Return whether the layer has a mask from an earlier compilation that the mode does not drop."""
        return self.site.weight in self.captured.carried and (given is None or given.weight is not None)

    def _mention_mask(
        self, given: LayerConfig | None, asked: LayerConfig | None, reason: str, rows: list[PlanRow]
    ) -> list[PlanRow]:
        """Return the rows of a layer that carries a mask, with a note on the mask if an exception applies to it."""
        if not self._carries_mask(given) or (self.layer.name in self.captured.bypassed and not asked):
            return rows
        pruned = [row for row in rows if row.phase is Phase.FORWARD and row.operand == "weight" and row.is_sparse]
        if pruned:
            note = f"{reason.partition(', not pruned')[0]}, {CARRIES}" if reason else ""
            return [replace(row, reason=note) if row in pruned else row for row in rows]
        dense = next((row for row in rows if row.phase is Phase.FORWARD and row.operand is None), None)
        lost = [row for row in rows if dense is not None and row.operand is None and row.reason == dense.reason]
        return [replace(row, reason=f"{row.reason}; {DROPPED}") if row in lost else row for row in rows]

    def _dense_reason(self, asked: LayerConfig | None, is_named: bool) -> str:
        """Return why the whole layer stays unchanged, or ""."""
        name, facts = self.layer.name, self.captured.facts[self.layer.name]
        if asked is None:
            return "left dense by CompileConfig.layers"
        if name in self.captured.bypassed:
            return f"bypassed: {self.captured.bypassed[name]}"
        if asked == LayerConfig() and name not in self.captured.recurrent:
            return ""
        if asked.weight is not None and (other := self._other_axis()) and not self._fits_both_axes(asked.weight):
            return (
                f"its weight is multiplied along its other axis by the layer {other!r}: only a transposable mask whose "
                "tiles fit is N:M along both"
            )
        if name in self.captured.tied:
            return f"{TIED} {self.captured.tied[name]!r}"
        if name in self.captured.adapters and not is_named:
            return ADAPTER
        if name in self.captured.recurrent and not is_named:
            return RECURRENT
        if self.layer.is_depthwise:
            return DEPTHWISE
        if self.config.ends != "sparse" and not is_named:
            if facts.first:
                return FIRST
            if facts.last:
                return LAST
        return ""

    def _other_axis(self) -> str:
        """Return the layer that contracts the other dim of the same weight, or ""."""
        behind = self.captured.behind
        for site in self.captured.sites:
            is_same = not (site.is_expression or self.site.is_expression) and site.layer.in_dim != self.layer.in_dim
            if is_same and behind.get(site.layer.name) == behind.get(self.layer.name, ()):
                return site.layer.name
        return ""

    def _fits_both_axes(self, pruning: Pruning) -> bool:
        pattern = pruning.pattern
        return pruning.is_transposable and self.layer.fits_forward(pattern) and self.layer.fits_backward(pattern)

    def _phase_rows(self, phase: Phase, asked: LayerConfig, given: LayerConfig, reason: str) -> Iterator[PlanRow]:
        """Plan at least one row; `reason` is why the layer does not get everything in its config."""
        why = reason if reason and any(self.operands.rows(phase, given)) else NOT_ASKED
        yield from list(self.operands.rows(phase, asked)) or [dense_row(self.layer, phase, why)]

    def _is_read_as_integers(self) -> bool:
        """Return whether only quantized layers are known to read the result."""
        return all(self._takes_integers(name) for name in self.captured.facts[self.layer.name].readers)

    def _takes_integers(self, name: str) -> bool:
        """Return whether the layer of that name puts its input on a grid."""
        asked = self._asked_of(name)
        return asked is not None and asked.input_bits is not None

    def _is_integer(self, name: str) -> bool:
        """Return whether the weight and the input of the layer of that name are quantized."""
        asked = self._asked_of(name)
        return asked is not None and None not in (asked.weight_bits, asked.input_bits)

    def _asked_of(self, name: str) -> LayerConfig | None:
        """Return the config that the layer of that name really gets; None if it stays unchanged or is none of ours."""
        site = next((site for site in self.captured.sites if site.layer.name == name), None)
        return None if site is None else replace(self, site=site)._judge(*self.outputs.asked(site))[0]

    def _check_exact(self, key: str | None, asked: LayerConfig | None, rows: list[PlanRow]) -> None:
        """Raise if a layer that is named exactly does not get its config: no silent dense."""
        if asked is None or key is None or key not in (self.layer.name, self.site.weight):
            return
        wanted = (
            (Phase.FORWARD, "weight", asked.weight),
            (Phase.FORWARD, "input", asked.input),
            (Phase.BACKWARD, "grad_output", asked.backward_gradient),
            (Phase.UPDATE, "grad_output", asked.update_gradient),
        )
        for phase, operand, pruning in wanted:
            if pruning is None or any(row.phase is phase and row.operand == operand for row in rows):
                continue
            if operand == "input" and self.operands.arrives:
                continue
            candidates = (*rows, *self.operands.rows(phase, asked))
            reason = next(row.reason for row in candidates if row.phase is phase and row.reason)
            raise PreconditionError(
                f"layer {self.layer.name!r} (weight {self.layer.weight_shape}) cannot be pruned as CompileConfig"
                f".layers[{key!r}] asks in the {phase.value} GEMM: {reason}; give another pattern or None"
            )


def _in_eight_bits(asked: LayerConfig | None, given: LayerConfig) -> LayerConfig:
    """Return a config with 8 bits for the operands that `given` quantizes and `asked` does not."""
    asked = asked or LayerConfig()
    weight, input = (None if bits is None else EIGHT for bits in (given.weight_bits, given.input_bits))
    return replace(asked, weight_bits=asked.weight_bits or weight, input_bits=asked.input_bits or input)
