"""The report on what `compile` would do."""

from nmcompile.api.compile import leave_dense
from nmcompile.api.pipeline import plan_and_lower
from nmcompile.api.request import Model, request_of
from nmcompile.arguments import Args, Kwargs
from nmcompile.checks import check_call
from nmcompile.config import CompileConfig
from nmcompile.ir.protocols import Backend
from nmcompile.report.report import Report, build_report


def analyze(
    model: Model,
    mode: str = "training",
    *,
    args: Args | None = None,
    kwargs: Kwargs | None = None,
    config: CompileConfig | None = None,
    backend: str | Backend = "auto",
) -> Report:
    """Report what `compile` would do; change nothing, the random state included.

    Arguments and errors are those of `compile`.
    """
    check_call(args, kwargs)
    request = request_of(model, mode, args, kwargs, config, backend)
    request = leave_dense(request)
    done = plan_and_lower(request)
    name = type(request.plain).__name__
    return build_report(done.program, {}, model_name=name, mode=mode, step_times=done.step_times)
