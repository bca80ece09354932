"""Back from a compiled model to the plain one."""

from torch import nn

from nmcompile.checks import check_compiled, check_kind
from nmcompile.three_gemm.copy_model import share_copy
from nmcompile.three_gemm.record import RECORD, restore_all


def decompile(compiled: nn.Module) -> nn.Module:
    """Return the plain model: its original classes and forwards, the same parameters and buffers, nothing masked."""
    check_compiled("compiled", compiled)
    plain = share_copy(compiled)
    restore_all(plain)
    return plain


def is_compiled(model: nn.Module) -> bool:
    """Return whether `compile` made this module, or one that it wraps."""
    check_kind("model", model, nn.Module, "a module")
    return any(RECORD in module.__dict__ for module in model.modules())
