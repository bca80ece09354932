"""Blocks of a Llama in plain PyTorch: grouped-query attention with rotary positions, and a gated MLP."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BASE = 500_000.0  # of the wavelengths of positions


@dataclass(frozen=True)
class Shape:
    """The sizes of a block; the defaults are those of Llama 3 8B."""

    width: int = 4096
    heads: int = 32
    key_heads: int = 8
    hidden: int = 14336

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class Attention(nn.Module):
    """Causal attention, in which several heads share a key and a value."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        keys = shape.key_heads * shape.head_width
        self.head_width = shape.head_width
        self.q_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.k_proj = nn.Linear(shape.width, keys, bias=False)
        self.v_proj = nn.Linear(shape.width, keys, bias=False)
        self.o_proj = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        query, key, value = (self.in_heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        query, key = rotated(query, angles), rotated(key, angles)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        output: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return output

    def in_heads(self, x: Tensor) -> Tensor:
        """Return `(batch, tokens, width)` as `(batch, heads, tokens, head width)`."""
        return x.unflatten(2, (-1, self.head_width)).transpose(1, 2)


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down_proj = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


class Block(nn.Module):
    """Attention and an MLP, each of the normalized input and added to it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(shape), GatedMlp(shape)
        self.before_attention, self.before_mlp = (nn.RMSNorm(shape.width, eps=1e-5) for _ in range(2))

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x), angles)
        output: Tensor = x + self.mlp(self.before_mlp(x))
        return output


class Blocks(nn.Module):
    """`count` blocks, whose input is `(batch, tokens, width)`, and a norm."""

    def __init__(self, count: int, tokens: int, shape: Shape) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(shape) for _ in range(count))
        self.norm = nn.RMSNorm(shape.width, eps=1e-5)
        wavelengths = BASE ** (torch.arange(0, shape.head_width, 2) / shape.head_width)
        self.register_buffer("angles", torch.arange(tokens).view(-1, 1) / wavelengths, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.angles)
        output: Tensor = self.norm(x)
        return output


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (i, i + half) of each head by the angles of its position."""
    low, high = x.chunk(2, -1)
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine], -1)
