"""Generative networks: autoencoders, a GAN's generator, and the denoisers of diffusion models."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def autoencoder(width: int = 16) -> nn.Module:
    """Return a convolutional autoencoder whose decoder is transposed convolutions."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Sigmoid(),
    )  # fmt: skip


def generator(width: int = 16, noise: int = 32) -> nn.Module:
    """Return the generator of a DCGAN (arXiv 1511.06434)."""
    return nn.Sequential(
        nn.ConvTranspose2d(noise, 4 * width, 4, bias=False), nn.BatchNorm2d(4 * width), nn.ReLU(),
        nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.ConvTranspose2d(2 * width, 3, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip


class Variational(nn.Module):
    """A variational autoencoder of vectors (arXiv 1312.6114); it draws in train() only."""

    def __init__(self, size: int = 64, width: int = 64, latent: int = 16) -> None:
        super().__init__()
        self.encode, self.moments = nn.Linear(size, width), nn.Linear(width, 2 * latent)
        self.decode = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.moments(self.encode(x).relu()).chunk(2, 1)
        drawn = torch.randn_like(mean) * (log_variance / 2).exp() if self.training else 0.0
        return self.decode(mean + drawn), log_variance


def times(t: Tensor, width: int) -> Tensor:
    """Return sinusoidal features of diffusion times."""
    angles = t[:, None] * torch.exp(-math.log(10000.0) * torch.arange(width // 2) / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], 1)


class Residual(nn.Module):
    """A residual block that takes features of the time."""

    def __init__(self, width_in: int, width_out: int, time: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(4, width_in), nn.GroupNorm(4, width_out)])
        self.convs = nn.ModuleList([nn.Conv2d(w, width_out, 3, padding=1) for w in (width_in, width_out)])
        self.time = nn.Linear(time, width_out)
        self.skip = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.convs[0](F.silu(self.norms[0](x))) + self.time(F.silu(t))[:, :, None, None]
        result: Tensor = self.skip(x) + self.convs[1](F.silu(self.norms[1](h)))
        return result


class SelfAttention2d(nn.Module):
    """Attention among the pixels of a feature map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(4, width), nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, 3)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        result: Tensor = x + self.out(h)
        return result


class DiffusionUNet(nn.Module):
    """The denoiser of DDPM (arXiv 2006.11239) with two levels."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down = Residual(width, 2 * width, 4 * width)
        self.shrink = nn.Conv2d(2 * width, 2 * width, 3, 2, 1)
        self.middle, self.attention = Residual(2 * width, 2 * width, 4 * width), SelfAttention2d(2 * width)
        self.grow = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = Residual(4 * width, width, 4 * width)
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = self.time(times(t, self.width))
        skip = self.down(self.first(x), t)
        h = self.attention(self.middle(self.shrink(skip), t))
        h = self.up(torch.cat([self.grow(F.interpolate(h, scale_factor=2.0)), skip], 1), t)
        result: Tensor = self.last(F.silu(h))
        return result


class DiTBlock(nn.Module):
    """A transformer block whose norms are shifted, scaled and gated by the condition."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.condition = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(F.silu(c))[:, None].chunk(6, 2)
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm(x) * (1 + scale1) + shift1).chunk(3, 2)
        )
        x = x + gate1 * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        result: Tensor = x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)
        return result


class DiT(nn.Module):
    """A diffusion transformer (arXiv 2212.09748) with two blocks."""

    def __init__(self, width: int = 32, heads: int = 4, patch: int = 4) -> None:
        super().__init__()
        self.width, self.patch = width, patch
        self.patches, self.time = nn.Conv2d(3, width, patch, patch), nn.Linear(width, width)
        self.blocks = nn.ModuleList([DiTBlock(width, heads) for _ in range(2)])
        self.last = nn.Linear(width, 3 * patch**2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c, h = self.time(times(t, self.width)), self.patches(x)
        size, h = h.shape[-1], h.flatten(2).transpose(1, 2)
        for block in self.blocks:
            h = block(h, c)
        return F.pixel_shuffle(self.last(h).transpose(1, 2).unflatten(2, (size, size)), self.patch)
