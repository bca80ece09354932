"""Seeds every test, and makes torchvision's wheel, which is built for CUDA, importable beside a CPU torch.

`NMCOMPILE_KERNELS` names a build of the native kernels to test in place of the installed one (see `make asan`).
`NMCOMPILE_SEED` is the seed of each test, 0 by default.
"""

import importlib.util
import os
import sys

import pytest
import torch

if path := os.environ.get("NMCOMPILE_KERNELS"):
    spec = importlib.util.spec_from_file_location("nmcompile._kernels", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

SEED = int(os.environ.get("NMCOMPILE_SEED", "0"))


@pytest.hookimpl(tryfirst=True)  # before fixtures draw
def pytest_runtest_setup() -> None:
    """Seed the test: it draws the same numbers alone as among others, so a failure can be reproduced."""
    torch.manual_seed(SEED)


try:
    # torchvision looks operators up by name. Keep the library object: the schemas live as long as it does.
    LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
except RuntimeError:
    pass  # torchvision is not installed, or is built for this torch
