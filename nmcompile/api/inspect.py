"""The report on a compiled model."""

from torch import nn

from nmcompile.checks import check_compiled
from nmcompile.report.layers import Observation
from nmcompile.report.report import Report, build_report
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.record import record_of


def inspect(compiled: nn.Module) -> Report:
    """Return a report on a compiled model: for each layer its plan, the reasons, and observations at run time.

    Args:
        compiled: a model that `compile` made, also inside DDP, FSDP2 or `torch.compile`.

    Raises:
        StateError: the model is not compiled.
    """
    check_compiled("compiled", compiled)
    root, record = record_of(compiled)
    observed = {
        triple.layer.name: Observation(
            triple.called,
            triple.positions,
            triple.graphs.kernels(),
            triple.graphs.choices(),
            None if triple.mask is None else triple.mask.found,
            record.permutations.get(triple.layer.name, ""),
        )
        for triple in triples_of(root)
    }
    name = type(root).__name__
    return build_report(record.program, observed, model_name=name, mode=record.mode, reverted=record.reverted)
