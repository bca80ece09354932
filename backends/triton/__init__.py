"""Pruning kernels in Triton for tensors on CUDA devices."""

from nmcompile.backends.triton.backend import TritonBackend as TritonBackend
