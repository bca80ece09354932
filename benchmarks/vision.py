"""torchvision's models, also where its wheel is built for CUDA and torch is not (it names CUDA operators), and timm."""

import torch

LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # a global: the schemas live as long as it does
for name in ("nms", "qnms"):
    if torch.version.cuda is None and not hasattr(torch.ops.torchvision, name):
        LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm as timm  # noqa: E402 - imports torchvision
from torchvision import models as models  # noqa: E402
