"""Architectures of torchvision and timm: few blocks, few channels, small images."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.sweep.architecture import Architecture, Inputs, images, tensors
from benchmarks.vision import models, timm


class Detection(nn.Module):
    """torchvision's RetinaNet without its last step: non-maximum suppression is no part of its wheel for CPUs."""

    def __init__(self) -> None:
        super().__init__()
        body = resnet(models.resnet.BasicBlock)
        layers = {f"layer{index}": str(index) for index in (2, 3, 4)}
        self.backbone = models.detection.backbone_utils.BackboneWithFPN(body, layers, [128, 256, 512], 32)
        self.head = models.detection.retinanet.RetinaNetHead(32, 3, 8)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(list(self.backbone(x).values()))


def resnet(block: Any, **sizes: Any) -> nn.Module:
    """Return a ResNet with one block a stage."""
    return models.ResNet(block, [1, 1, 1, 1], num_classes=10, **sizes)


def vgg() -> nn.Module:
    """Return a VGG of five convolutions and a head of 64 features."""
    features = models.vgg.make_layers([16, "M", 32, 32, "M", 64, 64, "M"], batch_norm=True)
    model = models.vgg.VGG(features, num_classes=10, init_weights=False)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10))
    return model


def segmenter() -> nn.Module:
    """Return DeepLabv3 over a MobileNetV3 of half the width."""
    body = models.mobilenet_v3_small(width_mult=0.5).features
    classifier = models.segmentation.deeplabv3.DeepLabHead(288, 4, (2, 4))
    return models.segmentation.DeepLabV3(nn.Sequential(body[:-1], OnlyOut(body[-1])), classifier)


class OnlyOut(nn.Module):
    """A last stage whose result has the name that torchvision's segmentation heads look for."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.stage(x)}


def tv(name: str, make: Callable[[], nn.Module], inputs: Callable[[int], Inputs]) -> Architecture:
    """Return an architecture of torchvision."""
    return Architecture(name, "torchvision", make, inputs)


_SETTING = models.convnext.CNBlockConfig
_BOTTLENECK, _BASIC = models.resnet.Bottleneck, models.resnet.BasicBlock
_VIT: dict[str, Any] = {"num_heads": 4, "hidden_dim": 48, "mlp_dim": 96, "num_classes": 10}
_SWIN: dict[str, Any] = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "num_classes": 10}

TORCHVISION = (
    tv("ResNet, basic blocks", partial(resnet, _BASIC), images(32)),
    tv("ResNet, bottlenecks", partial(resnet, _BOTTLENECK, width_per_group=16), images(32)),
    tv("VGG with norms", vgg, images(32)),
    tv("SqueezeNet", partial(models.squeezenet1_1, num_classes=10), images(64)),
    tv("DenseNet", partial(models.DenseNet, 8, (2, 2, 2), 16, num_classes=10), images(32)),
    tv("GoogLeNet", partial(models.googlenet, weights=None, init_weights=False, aux_logits=False, num_classes=10),
       images(64)),
    tv("MobileNetV2", partial(models.mobilenet_v2, width_mult=0.25, num_classes=10), images(64)),
    tv("MobileNetV3", partial(models.mobilenet_v3_small, width_mult=0.5, num_classes=10), images(64)),
    tv("EfficientNet", partial(models.efficientnet_b0, num_classes=10), images(64)),
    tv("RegNet", partial(models.regnet_y_400mf, num_classes=10), images(64)),
    tv("ConvNeXt", lambda: models.ConvNeXt(
        [_SETTING(24, 48, 1), _SETTING(48, 96, 1), _SETTING(96, None, 1)], num_classes=10), images(64)),
    tv("ViT of torchvision", lambda: models.VisionTransformer(32, 8, 2, **_VIT), images(32)),
    tv("Swin of torchvision", lambda: models.SwinTransformer([4, 4], window_size=[4, 4], **_SWIN), images(64)),
    tv("MaxViT", lambda: models.MaxVit(
        (64, 64), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=10), images(64)),
    tv("Swin of videos", lambda: models.video.SwinTransformer3d(
        [2, 4, 4], window_size=[2, 4, 4], **_SWIN), tensors(3, 4, 32, 32)),
    tv("RetinaNet", Detection, images(64)),
    tv("DeepLabv3", segmenter, images(64)),
)  # fmt: skip
"""The architectures of torchvision."""


def tm(name: str, size: int = 64, **sizes: Any) -> Architecture:
    """Return an architecture of timm."""
    return Architecture(name, "timm", partial(timm.create_model, name, num_classes=10, **sizes), images(size))


def plain(name: str, make: Callable[..., nn.Module], size: int = 64, **sizes: Any) -> Architecture:
    """Return an architecture of timm by its class."""
    return Architecture(name, "timm", partial(make, num_classes=10, **sizes), images(size))


_MIXERS, _FORMERS = timm.models.mlp_mixer, timm.models.metaformer
_MIXER: dict[str, Any] = {"img_size": 64, "patch_size": 8, "num_blocks": 2, "embed_dim": 48}
_FORMER: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (16, 32, 64, 96)}
_SMALL_VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
TIMM = (
    tm("deit_tiny_distilled_patch16_224", 32, **_SMALL_VIT),
    tm("beit_base_patch16_224", 32, **_SMALL_VIT),
    tm("eva02_tiny_patch14_224", 32, **_SMALL_VIT),
    tm("samvit_base_patch16", 32, **_SMALL_VIT, window_size=2, global_attn_indexes=(1,)),
    plain("MLP-Mixer", _MIXERS.MlpMixer, **_MIXER),
    plain("gMLP", _MIXERS.MlpMixer, block_layer=_MIXERS.SpatialGatingBlock, mlp_layer=timm.layers.GatedMlp, mlp_ratio=4,
          **_MIXER),
    plain("ResMLP", _MIXERS.MlpMixer, block_layer=_MIXERS.ResBlock, norm_layer=_MIXERS.Affine, mlp_ratio=4, **_MIXER),
    plain("ConvMixer", timm.models.convmixer.ConvMixer, dim=48, depth=2),
    plain("PoolFormer", _FORMERS.MetaFormer, token_mixers=_FORMERS.Pooling, **_FORMER),
    plain("CAFormer", _FORMERS.MetaFormer, token_mixers=[_FORMERS.SepConv] * 2 + [_FORMERS.Attention] * 2,
          norm_layers=[_FORMERS.LayerNorm2dNoBias] * 2 + [_FORMERS.LayerNormNoBias] * 2, **_FORMER),
    tm("xcit_nano_12_p16_224", 64, img_size=64, depth=2),
    tm("swin_tiny_patch4_window7_224", 64, img_size=64, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4)),
    tm("pvt_v2_b0", 64, depths=(1, 1, 1, 1)),
    tm("twins_svt_small", 64, img_size=64, depths=(1, 1, 2, 1), embed_dims=(16, 32, 48, 64), num_heads=(2, 2, 4, 4)),
    tm("hiera_tiny_224", 64, img_size=(64, 64), embed_dim=24, stages=(1, 1, 1, 1)),
    tm("levit_128s", 64, img_size=64),
    tm("mobilevit_xxs", 64),
    tm("fastvit_t8", 64, layers=(1, 1, 1, 1)),
    tm("convnextv2_atto", 64, depths=(1, 1, 1, 1)),
    tm("mambaout_femto", 64, depths=(1, 1, 1, 1)),
    tm("sequencer2d_s", 64, img_size=64, layers=(1, 1, 1, 1), embed_dims=(24, 48, 48, 48),
       hidden_sizes=(8, 16, 16, 16)),
    tm("ghostnet_050", 64),
    tm("repvgg_a0", 64),
    tm("res2net50_26w_4s", 64, layers=(1, 1, 1, 1), base_width=8),
    tm("resnest14d", 64, base_width=16),
)  # fmt: skip
"""The architectures of timm."""
