"""Lets torchvision's wheel, which is built for CUDA, be imported beside a CPU torch: it asks for operators by name."""

import torch

try:
    # Kept: the schemas live as long as the library object.
    LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
except RuntimeError:
    pass  # torchvision is not installed, or is built for this torch
