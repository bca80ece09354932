"""Report of which layers run sparse in a TensorRT engine, and why the others do not.

Eligible does not mean chosen: TensorRT times sparse and dense tactics and takes the faster.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nmcompile.backends.tensorrt.engine_layers import EngineLayer
from nmcompile.backends.tensorrt.sidecar import Sidecar
from nmcompile.backends.tensorrt.sparsity_log import Listed, SparsityLog
from nmcompile.files.read_weights import OnnxWeight
from nmcompile.printable import table
from nmcompile.pruning.pattern import NMPattern

ALIGNMENT = {"FLOAT16": (16, 8), "INT8": (32, 32)}  # in- and out-channels, by precision that has sparse tactics
TWO_OF_FOUR = NMPattern(2, 4)
WORTHWHILE = 256  # channels from which sparse tactics begin to win, kernel positions counted on the inner side

FASTER = "eligible, but a dense tactic was timed as faster"
NOT_FOUND = "TensorRT did not find its weight eligible, though it is 2:4"
SWITCHED_OFF = "built with sparse=False"
UNKNOWN = "eligible; which tactic runs is known once the plan is loaded"


@dataclass(frozen=True)
class LayerReport:
    """One conv, Gemm or MatMul node of the ONNX file.

    Attributes:
        eligible: whether its weight can use a sparse tactic, according to the builder or else to the weight itself.
        sparse: whether it got one; None if that is known only once the plan is loaded.
        tactic: the kernel, if known.
        reason: why it is not known to run sparse; "" if it does.
    """

    name: str
    op: str
    in_channels: int
    out_channels: int
    precision: str
    eligible: bool
    sparse: bool | None
    tactic: str | None
    reason: str

    @property
    def channels(self) -> str:
        return f"{self.in_channels}->{self.out_channels}"


@dataclass(frozen=True)
class EngineReport:
    """A built plan: its path, its sidecar, and its layers."""

    path: Path
    sidecar: Sidecar
    layers: tuple[LayerReport, ...]

    def to_json(self) -> str:
        return json.dumps({"version": 1, **asdict(self), "path": str(self.path)}, indent=1)

    def __str__(self) -> str:
        mark = {True: "yes", False: "no", None: "?"}
        rows = [
            [row.name, row.op, row.channels, row.precision, mark[row.eligible], mark[row.sparse], row.reason]
            for row in self.layers
        ]
        found = table(rows, headers=["layer", "op", "channels", "precision", "eligible", "sparse", "reason"])
        sparse = sum(layer.sparse is True for layer in self.layers)
        eligible = sum(layer.eligible for layer in self.layers)
        return (
            f"{found}\n\n{len(self.layers)} layers: {eligible} eligible for sparse tactics, {sparse} known to have one"
        )


def explain(
    weights: Iterable[OnnxWeight], layers: Sequence[EngineLayer], log: SparsityLog, sparse: bool
) -> list[LayerReport]:
    """Join the contents of the file, the layers that the engine lists and the messages of the builder.

    Args:
        weights: weights of the ONNX file.
        layers: layers of the engine; empty if it lists none.
        log: the builder's lines on sparsity.
        sparse: whether sparse tactics were allowed.
    """
    return [_explained(weight, _layer_of(weight, layers), log, sparse) for weight in weights]


def _explained(weight: OnnxWeight, layer: EngineLayer | None, log: SparsityLog, sparse: bool) -> LayerReport:
    obstacle = _obstacle(weight)
    names = [weight.node] + ([layer.name] if layer else [])
    found = _among(log.eligible, names)
    chosen = _among(log.chosen, names) if sparse else False
    if chosen is None and layer is not None:
        chosen = layer.is_sparse
    if chosen is None and obstacle:
        chosen = False
    reason = ""
    if not sparse:
        reason = SWITCHED_OFF
    elif not chosen:
        reason = obstacle or (NOT_FOUND if found is False else _odds(weight, layer, chosen))
    return LayerReport(
        name=weight.node,
        op=weight.op,
        in_channels=weight.in_channels,
        out_channels=weight.out_channels,
        precision=weight.precision,
        eligible=not obstacle if found is None else found,
        sparse=chosen,
        tactic=layer.tactic if layer else None,
        reason=reason,
    )


def _layer_of(weight: OnnxWeight, layers: Iterable[EngineLayer]) -> EngineLayer | None:
    """Return the engine layer that holds the node; if its epilogue became a layer too, the one that has its name."""
    holders = [layer for layer in layers if weight.node in layer.nodes]
    return max(holders, key=lambda layer: weight.node in layer.name, default=None)


def _among(listed: Listed | None, names: Iterable[str]) -> bool | None:
    if listed is None or (listed.names is None and listed.count):
        return None
    return any(listed.has(name) for name in names)


def _obstacle(weight: OnnxWeight) -> str:
    """Return why no TensorRT could run the node sparse, or ""."""
    if weight.hidden_by:
        return f"its weight comes out of a {weight.hidden_by} node; write the zeros into the initializer itself"
    if weight.in_channels % 4:
        return f"{weight.in_channels} in-channels{' a group' * (weight.groups > 1)}: not a multiple of 4"
    if broken := weight.violations(TWO_OF_FOUR):
        return f"its weight is not 2:4 along in-channels: {broken} blocks hold more than two non-zeros"
    if weight.precision not in ALIGNMENT:
        return f"computed in {weight.precision}; sparse tactics are for {' and '.join(ALIGNMENT)}"
    return ""


def _odds(weight: OnnxWeight, layer: EngineLayer | None, chosen: bool | None) -> str:
    """Return why an eligible node did not get a sparse tactic, or may not get one."""
    hint = _misaligned(weight) or _neighbours(weight, layer) or _small(weight)
    known = UNKNOWN if chosen is None else FASTER
    return f"{known}; {hint}" if hint else known


def _misaligned(weight: OnnxWeight) -> str:
    inner, outer = ALIGNMENT[weight.precision]
    if weight.in_channels % inner == 0 and weight.out_channels % outer == 0:
        return ""
    return f"{weight.in_channels} in- and {weight.out_channels} out-channels: multiples of {inner} and {outer} do best"


def _neighbours(weight: OnnxWeight, layer: EngineLayer | None) -> str:
    types = [] if layer is None else [kind for kind in layer.output_types if "int8" not in kind.lower()]
    if weight.precision != "INT8" or not types:
        return ""
    return f"it writes {types[0]}; INT8 sparse tactics write INT8: quantize its output too"


def _small(weight: OnnxWeight) -> str:
    inner = weight.in_channels * weight.kernel
    if min(inner, weight.out_channels) >= WORTHWHILE:
        return ""
    return f"{inner} by {weight.out_channels} is small: sparse tactics begin to win at about {WORTHWHILE}"
