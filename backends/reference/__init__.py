"""Dense PyTorch math on pruned operands."""

from nmcompile.backends.reference.backend import ReferenceBackend as ReferenceBackend
