"""Native kernels for tensors on the CPU."""

from nmcompile.backends.cpu.backend import CpuBackend as CpuBackend
