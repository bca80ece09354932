"""torchvision's models, also where its wheel asks a CPU torch for operators of CUDA (it does so by name, on import)."""

import torch

LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # kept: the schemas live as long as it does
for name in ("nms", "qnms"):
    if torch.version.cuda is None and not hasattr(torch.ops.torchvision, name):
        LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from torchvision import models as models  # noqa: E402
