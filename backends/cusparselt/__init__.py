"""GEMMs with a 2:4 operand on NVIDIA's sparse tensor cores, by cuSPARSELt."""

from nmcompile.backends.cusparselt.backend import CusparseltBackend as CusparseltBackend
