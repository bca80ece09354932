"""Compiled kernels: how wide they read and write, and how many instructions they execute."""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def codes() -> Any:
    """Compile every case of `sm90` in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.backends.sm90"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("case", "bits"),
    [
        ("samples", 64),
        ("samples of odd sides", 64),
        ("samples, a partial block", 64),
        ("samples, 34 channels", 32),  # the largest power of two that divides a position
        ("samples, 33 channels", 16),
        ("samples in float32", 64),
        ("positions", 64),
        ("positions, a partial block", 64),
        ("channels", 128),
        ("channels, a partial block", 16),  # its elements exist one by one
        ("pairs of a matrix", 64),
        ("packed", 32),  # the codes
    ],
)
def test_accesses_to_memory_are_wide(case: str, bits: int, codes: Any) -> None:
    accesses = codes[case]["accesses"]
    assert accesses and min(map(width, accesses)) == bits, accesses


def width(code: str) -> int:
    """Return the bits of a load or store: those of its suffix, or 32."""
    number = code.rpartition(".")[2].lstrip("EUS")
    return int(number) if number else 32


@pytest.mark.parametrize(
    ("case", "blocks", "limit"),
    [
        ("samples", 16, 150),
        ("samples of odd sides", 16, 170),  # their first numbers stand anywhere in a counter
        ("positions", 16, 60),
        ("pairs of a matrix", 16, 60),
        ("packed", 8, 150),
        ("packed and summed", 8, 165),
        ("packed in both directions", 16, 60),
    ],
)
def test_a_block_takes_few_instructions(case: str, blocks: int, limit: int, codes: Any) -> None:
    assert codes[case]["executed"] <= limit * blocks, "for the blocks of a thread"
