"""The report on what `compile` would do."""

from nmcompile.api.compile import leave_dense
from nmcompile.api.pipeline import plan_and_lower
from nmcompile.api.predict_gain import predict_gains
from nmcompile.api.request import Model, request_of
from nmcompile.arguments import Args, Kwargs
from nmcompile.checks import check_call, check_kind
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
    predict: bool = False,
) -> Report:
    """Report what `compile` would do; change nothing, the random state included.

    Arguments and errors are those of `compile`. With `predict` and `args` the report has predictions by cost models:
    the time of all GEMMs of a step, dense and pruned, on this CPU, whose kernels are timed for it, and on GPUs.
    """
    check_call(args, kwargs)
    check_kind("predict", predict, bool, "True or False")
    request = request_of(model, mode, args, kwargs, config, backend)
    request = leave_dense(request)
    done = plan_and_lower(request)
    name, gains = type(request.plain).__name__, predict_gains(request) if predict else ()
    return build_report(done.program, {}, model_name=name, mode=mode, step_times=done.step_times, predictions=gains)
