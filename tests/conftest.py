"""Lets torchvision's wheel, which is built for CUDA, be imported beside a CPU torch: it asks for operators by name.

`NMCOMPILE_KERNELS` names a build of the native kernels to test in place of the installed one (see `make asan`).
"""

import importlib.util
import os
import sys

import torch

import nmcompile

if path := os.environ.get("NMCOMPILE_KERNELS"):
    spec = importlib.util.spec_from_file_location("nmcompile._kernels", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    nmcompile._kernels = module

try:
    # Kept: the schemas live as long as the library object.
    LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
except RuntimeError:
    pass  # torchvision is not installed, or is built for this torch
