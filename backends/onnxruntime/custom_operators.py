"""Native operators for ONNX Runtime. Each has the domain and the name of a function in exported files.

Where the operators are registered, ONNX Runtime runs them and never looks at the functions. A file stays the same and
runs everywhere.
"""

from collections.abc import Sequence
from functools import cache

import onnxruntime

from nmcompile.checks import check_kind
from nmcompile.errors import BackendUnavailable
from nmcompile.files.open_onnx import OnnxFile
from nmcompile.native import MISSING, kernels

DOMAIN = "nmcompile"
OPERATORS = frozenset({"PruneIntegers_4_8_Features", "PruneLargeIntegers_4_8_Features", "RoundIntegers"})
CPU = ("CPUExecutionProvider",)


def register(session_options: onnxruntime.SessionOptions) -> None:
    """Let sessions with these options prune 4:8 and round integers by native operators of the CPU.

    They replace functions of standard operators in files of `nmcompile.export`, with equal results, and run on the
    session's own threads. Call this once for each options object. Leave it out for sessions on a GPU: tensors would be
    copied to the CPU and back.

    Raises:
        BackendUnavailable: nmcompile is installed without native kernels, or ONNX Runtime is older than 1.18.
        ConfigError: not the options of a session.
    """
    check_kind("session_options", session_options, onnxruntime.SessionOptions, "an onnxruntime.SessionOptions")
    if MISSING:
        raise BackendUnavailable(
            f"the native operators are missing: nmcompile._kernels cannot be imported ({MISSING}); reinstall nmcompile "
            "with a compiler, or run the file as it is"
        )
    try:
        session_options.register_custom_ops_library(kernels.__file__)
    except Exception as error:  # ONNX Runtime's errors share no other base
        version = onnxruntime.__version__
        raise BackendUnavailable(f"ONNX Runtime {version} refuses the native operators: {error}") from error


def replaced_functions(model: OnnxFile, providers: Sequence[str]) -> tuple[str, ...]:
    """Return the functions of a model that native operators replace: none if they cannot, or beside a GPU."""
    if tuple(providers) != CPU or not _is_available():
        return ()
    return tuple(sorted(one.name for one in model.proto.functions if one.domain == DOMAIN and one.name in OPERATORS))


@cache
def _is_available() -> bool:
    try:
        register(onnxruntime.SessionOptions())
    except BackendUnavailable:
        return False
    return True
