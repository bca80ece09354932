"""2:4 weights on NVIDIA's sparse tensor cores, through PyTorch's cuSPARSELt operators."""

from nmcompile.backends.cusparselt.backend import CusparseltBackend as CusparseltBackend
