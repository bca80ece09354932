"""Where the tests run Triton kernels: on a CUDA device, or without one in Triton's interpreter, on CPU tensors."""

import os
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from nmcompile.pruning import OPERATORS

HAS_DEVICE = torch.cuda.is_available()
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(HAS_DEVICE, reason="compiled kernels take CUDA tensors")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_DEVICE, reason="no CUDA device")]),
]
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
DTYPES = sorted(BITS, key=str)
KINDS = ["normal", "ties", "wide", "sparse", "special"]
PRUNING = [
    ("greedy", "1:2"),
    ("greedy", "2:4"),
    ("greedy", "4:8"),
    ("greedy_by_value", "4:8"),
    ("mvue", "1:2"),
    ("mvue", "2:4"),
    ("mvue", "3:7"),
    ("mvue", "4:8"),
    ("mvue_approx", "2:4"),
]


def interpreter() -> AbstractContextManager[Any]:
    """Request the interpreter if there is no device: around the import of kernels, and around launches."""
    return mock.patch.dict(os.environ, {} if HAS_DEVICE else {"TRITON_INTERPRET": "1"})


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Check for equal bits; a NaN need only be a NaN."""
    actual = actual.cpu()
    assert actual.isnan().equal(expected.isnan())
    numbers = [x.nan_to_num(0.0, torch.inf, -torch.inf) for x in (actual, expected)]
    assert numbers[0].view(BITS[expected.dtype]).equal(numbers[1].view(BITS[expected.dtype]))


def reference(x: Tensor, operator: str, pattern: str, dim: int, key: Tensor) -> Tensor:
    """Prune with the reference operator; those that draw nothing take no key."""
    chosen = OPERATORS[operator]
    return chosen.prune(x, pattern, dim, key if chosen.needs_key else None)
