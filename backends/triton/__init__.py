"""Pruning kernels in Triton for tensors on CUDA devices."""

from nmcompile.backends.triton.backend import TritonBackend as TritonBackend
from nmcompile.backends.triton.backend import mask_kernel as mask_kernel
from nmcompile.backends.triton.backend import prune as prune
