"""The compiled kernels: how wide they read and write, and how many instructions they execute."""

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


@pytest.mark.parametrize("case", ["batch", "odd", "flat", "channels", "pairs"])
def test_no_access_is_narrower_than_64_bits(case: str, codes: Any) -> None:
    accesses = codes[case]["accesses"]
    assert accesses and all(code.endswith((".64", ".128")) for code in accesses), accesses


@pytest.mark.parametrize(
    ("case", "limit"),
    [
        ("batch", 150),  # exact MVUE 2:4
        ("odd", 170),  # where a counter's words start anywhere
        ("flat", 60),  # MVUE 1:2
        ("pairs", 60),  # the same of a matrix
    ],
)
def test_a_block_takes_few_instructions(case: str, limit: int, codes: Any) -> None:
    assert codes[case]["executed"] <= limit * 16, "a thread prunes 16 blocks"
