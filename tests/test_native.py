"""The compiled module has one door, and everything but its kernels works without it."""

import ast
import subprocess
import sys
from pathlib import Path

import nmcompile

PURE = """
import sys
sys.modules["nmcompile._kernels"] = None  # as an import that fails

import torch
from torch import nn
import nmcompile
from nmcompile.backends.cpu import CpuBackend
from nmcompile.errors import BackendUnavailable
from nmcompile.fingerprint import fingerprint

support = CpuBackend().available()
assert not support.ok and "nmcompile._kernels cannot be imported" in support.reason, support
layer, x = nn.Linear(8, 8), torch.randn(4, 8)
assert fingerprint(x) is not None
try:
    nmcompile.compile(layer, backend="cpu")
except BackendUnavailable as error:
    assert support.reason in str(error)
else:
    raise AssertionError("compiled for a backend that is not there")
nmcompile.compile(layer, "training")(x).sum().backward()
"""


def imports_kernels(path: Path) -> bool:
    """Return whether a file imports the compiled module, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [str(getattr(node, "module", ""))]
            if any(name.endswith("_kernels") for name in names):
                return True
    return False


def test_one_module_imports_it() -> None:
    package = Path(nmcompile.__file__).parent
    folders = package, package / "backends", package / "passes"  # links are not followed
    found = {path.name for folder in folders for path in folder.rglob("*.py") if imports_kernels(path)}
    assert found == {"native.py"}


def test_a_pure_installation_works_and_says_why_it_has_no_kernels() -> None:
    subprocess.run([sys.executable, "-c", PURE], check=True)
