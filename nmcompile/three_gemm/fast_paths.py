"""Torch's inference fast path of transformer encoders, which is closed while they hold rewritten layers."""

from torch import nn

OPENED = "three_gemm_fast_path"
"""Attribute under which an encoder keeps the value that opened its fast path."""

# The layer's inference kernel reads the dense weights of its children, and the encoder packs a padded batch into a
# nested tensor that only that kernel takes. Without them, padded positions hold the same in eval() as in train(), and
# the same as in eager with gradients on; eager's packed batches hold zeros there.
FAST_PATHS: dict[type[nn.Module], tuple[str, object]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
"""Attribute by class that opens torch's inference fast path, and the value that closes it."""


def close_fast_paths(model: nn.Module) -> None:
    """Keep torch's encoders that hold rewritten layers from their inference fast path."""
    for module in model.modules():
        for kind, (switch, closed) in FAST_PATHS.items():
            if isinstance(module, kind) and any("three_gemms" in vars(m) for m in module.modules()):
                module.__dict__.setdefault(OPENED, getattr(module, switch, closed))
                setattr(module, switch, closed)


def open_fast_path(module: nn.Module) -> None:
    """Let an encoder take its fast path again, if it could before."""
    for kind, (switch, _) in FAST_PATHS.items():
        if isinstance(module, kind) and OPENED in module.__dict__:
            setattr(module, switch, module.__dict__.pop(OPENED))
