"""Small nets whose channels are tied in different ways."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Concatenated(nn.Module):
    """Two branches of different widths beside their input, as in DenseNet."""

    def __init__(self, width: int, kernel: int = 3) -> None:
        super().__init__()
        self.a = nn.Conv2d(width, 8, kernel, padding=kernel // 2)
        self.b = nn.Conv2d(width, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), x, F.relu(self.b(x))], 1)


class Shuffled(nn.Module):
    """Half of the channels pass by, as in ShuffleNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width // 2, width // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        both = torch.stack([a, self.conv(b)], 2)
        return both.flatten(1, 2)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, 8)
        self.up = nn.Linear(8, width)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.up(F.silu(self.down(x.mean((2, 3))))).sigmoid()
        return x * scale[:, :, None, None]


class Gated(nn.Module):
    """A gate and a value, in two layers or packed in one."""

    def __init__(self, width: int, inner: int, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        self.gate = nn.Linear(width, inner * (1 + packed), bias=False)
        self.value = None if packed else nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate(x).chunk(2, -1) if self.value is None else (self.gate(x), self.value(x))
        return self.down(F.silu(gate) * value)


class Attention(nn.Module):
    """Grouped-query attention, with rotary embeddings if asked for."""

    def __init__(self, width: int, heads: int, shared: int, rotary: bool) -> None:
        super().__init__()
        self.heads, self.shared, self.size, self.rotary = heads, shared, width // heads, rotary
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, self.size * shared)
        self.v = nn.Linear(width, self.size * shared)
        self.o = nn.Linear(width, width)

    def turned(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.linspace(1, 0.1, self.size // 2).to(x)
        angle = torch.cat([angle, angle], -1)
        a, b = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.rotary:
            q, k = self.turned(q), self.turned(k)
        k, v = (one.repeat_interleave(self.heads // self.shared, 1) for one in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Language(nn.Module):
    """Embedding, blocks and a head, which may be the embedding's weight."""

    def __init__(self, *, tied: bool, rotary: bool, packed: bool, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 32)
        self.place = nn.Parameter(torch.randn(1, 6, 32))
        self.attend = Residual(nn.Sequential(norm(32), Attention(32, 4, 2, rotary)))
        self.gated = Residual(nn.Sequential(norm(32), Gated(32, 24, packed)))
        self.norm = norm(32)
        self.head = nn.Linear(32, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.gated(self.attend(self.embed(tokens) + self.place))))
