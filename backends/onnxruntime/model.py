"""An exported ONNX file as a callable on torch tensors.

ONNX Runtime runs whole files. It is not a `Backend` of the three graphs: it lowers no node, and `compile` never picks
it.
"""

import os
from collections.abc import Sequence
from types import TracebackType

from torch import Tensor

from nmcompile.backends.onnxruntime.custom_operators import CPU, replaced_functions
from nmcompile.backends.onnxruntime.isolation import IsolatedSession, Limits
from nmcompile.backends.onnxruntime.session import Session
from nmcompile.backends.onnxruntime.values import checked_inputs
from nmcompile.checks import check_kind
from nmcompile.errors import ConfigError
from nmcompile.files.onnx_rules import check_runnable
from nmcompile.files.open_onnx import open_onnx


class OnnxRuntimeModel:
    """A callable ONNX model. `close()`, or the end of a `with` block, frees its memory and ends its process.

    Attributes:
        inputs: name, dtype and shape of each; a dimension given by a name may have any size, the same everywhere.
        outputs: likewise.
        device: device of the inputs and the outputs.
        native_functions: functions in the file that native operators replace; empty if standard operators run.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes,
        providers: Sequence[str] = CPU,
        threads: int | None = None,
        *,
        isolated: bool | Limits = False,
    ) -> None:
        """Check the model as untrusted, and open a session on it.

        On the CPU, native operators replace functions in the file if nmcompile has its kernels (see `register`).

        Args:
            model: a file or its bytes.
            providers: providers of ONNX Runtime, first choice first. With TensorRT its sparse tactics are on.
            threads: threads of one operator; None for one per core.
            isolated: run in a process of its own on the CPU. A file which kills ONNX Runtime, never ends or takes too
                much memory is then an error; `Limits` set the limits. Tensors are copied to the process and back.

        Raises:
            FileError: a damaged or hostile file, or one that ONNX Runtime refuses or that kills it.
            BackendUnavailable: a provider that this machine does not have; there is no silent fallback.
            ConfigError: other providers with `isolated`.
        """
        check_kind("isolated", isolated, bool | Limits, "True, False or Limits(seconds=..., memory=...)")
        if isolated and tuple(providers) != CPU:
            raise ConfigError(f"isolated=True runs on the CPU, not with {', '.join(providers)}; leave one of them out")
        file = open_onnx(model)
        check_runnable(file)
        self.native_functions = replaced_functions(file, providers)
        native = bool(self.native_functions)
        if isolated:
            limits = isolated if isinstance(isolated, Limits) else Limits()
            self._session: Session | IsolatedSession = IsolatedSession(file, threads, limits, native)
        else:
            self._session = Session(file, providers, threads, native)
        self.inputs, self.outputs, self.device = self._session.inputs, self._session.outputs, self._session.device

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the model.

        Args:
            args: the inputs in their order.
            kwargs: inputs by name.

        Returns:
            The output, or a tuple if there are several.

        Raises:
            OperandError: a missing or unknown input, or one of another dtype, shape or device.
            LoweringError: an operator failed, the model is closed, or its process died or took too long.
        """
        results = self._session.run(checked_inputs(self.inputs, args, kwargs, self.device))
        return results[0] if len(results) == 1 else results

    def close(self) -> None:
        """Release the session, or end its process; the model cannot be called after that."""
        self._session.close()

    def __enter__(self) -> "OnnxRuntimeModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
