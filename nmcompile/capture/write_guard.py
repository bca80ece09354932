"""A watch over the operators that really run: they may not write to protected memory."""

from collections.abc import Sequence

from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from nmcompile.arguments import Args, Kwargs, tensors_in
from nmcompile.capture.writes import written_arguments
from nmcompile.ir.storage_key import storage_key


class WriteGuard(TorchDispatchMode):
    """A mode that raises before an operator writes, by whatever means: `x.data`, a view, `out=`, a list of tensors.

    Args:
        protected: the storages, by `storage_key`.
        error: what to raise.
    """

    def __init__(self, protected: frozenset[int], error: BaseException) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.protected = protected
        self.error = error

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        written = tensors_in(written_arguments(func, args, kwargs)) if func._schema.is_mutable else ()
        if any(storage_key(tensor) in self.protected for tensor in written):
            raise self.error
        result: object = func(*args, **kwargs)
        return result
