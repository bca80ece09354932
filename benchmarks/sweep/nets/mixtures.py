"""Mixtures of experts in the four ways in which they are written, and networks of several towers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ListedExperts(nn.Module):
    """Experts in a `ModuleList`; each runs on the tokens that chose it."""

    def __init__(self, width: int = 32, experts: int = 4) -> None:
        super().__init__()
        self.first, self.router = nn.Linear(16, width), nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(experts)
        )
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).flatten(0, 1)
        weights, chosen = self.router(x).softmax(1).topk(2)
        result = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            result = result.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        result = self.head(result)
        return result


class _ExpertParameters(nn.Module):
    """Experts as 3-d parameters, between a first layer with a router and a head."""

    def __init__(self, width: int = 32, experts: int = 4) -> None:
        super().__init__()
        self.first, self.router = nn.Linear(16, width), nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, 2 * width) * 0.1)
        self.down = nn.Parameter(torch.randn(experts, 2 * width, width) * 0.1)
        self.head = nn.Linear(width, 8)


class StackedExperts(_ExpertParameters):
    """Experts as 3-d parameters; all run on all tokens by `bmm`, and the router weighs them."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).flatten(0, 1)
        h = F.gelu(torch.bmm(x.expand(len(self.up), -1, -1), self.up))
        weights = self.router(x).softmax(1).t()[..., None]
        result: Tensor = self.head((torch.bmm(h, self.down) * weights).sum(0))
        return result


class EinsumExperts(_ExpertParameters):
    """Experts as 3-d parameters, multiplied by `einsum` (GShard, arXiv 2006.16668)."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        h = F.gelu(torch.einsum("bti,eio->beto", x, self.up))
        h = torch.einsum("beti,eio->beto", h, self.down)
        result: Tensor = self.head(torch.einsum("beto,bte->bto", h, self.router(x).softmax(2)))
        return result


class LoopedExperts(nn.Module):
    """Experts as 3-d parameters; a loop takes one matrix at a time."""

    def __init__(self, width: int = 32, experts: int = 4) -> None:
        super().__init__()
        self.first, self.router = nn.Linear(16, width), nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, 2 * width, width) * 0.1)
        self.down = nn.Parameter(torch.randn(experts, width, 2 * width) * 0.1)
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).flatten(0, 1)
        weights = self.router(x).softmax(1)
        result = torch.zeros_like(x)
        for expert in range(4):
            h = F.linear(F.linear(x, self.up[expert]).relu(), self.down[expert])
            result = result + h * weights[:, expert, None]
        return self.head(result)  # type: ignore[no-any-return]


class TwoTowers(nn.Module):
    """Embeddings of users and items and their cosine."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.users, self.items = (
            nn.Sequential(
                nn.Linear(features, 2 * width), nn.ReLU(), nn.Linear(2 * width, 2 * width), nn.ReLU(),
                nn.Linear(2 * width, width),
            )
            for features in (24, 40)
        )  # fmt: skip

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return F.cosine_similarity(self.users(user), self.items(item))


class Recommender(nn.Module):
    """Tables of embeddings, their products in pairs, and layers over both (DLRM, arXiv 1906.00091)."""

    def __init__(self, width: int = 16, tables: int = 3) -> None:
        super().__init__()
        self.dense = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, width), nn.ReLU())
        self.tables = nn.ModuleList([nn.Embedding(20, width) for _ in range(tables)])
        self.top = nn.Sequential(nn.Linear(width + 6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, dense: Tensor, chosen: Tensor) -> Tensor:
        h = self.dense(dense)
        looked_up = [table(chosen[:, index]) for index, table in enumerate(self.tables)]
        features = torch.stack([h, *looked_up], 1)
        products = features @ features.transpose(1, 2)
        upper = [products[:, i, j] for i in range(4) for j in range(i)]
        result: Tensor = self.top(torch.cat([h, torch.stack(upper, 1)], 1))
        return result


class Siamese(nn.Module):
    """One body for two images."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 32),
        )  # fmt: skip
        self.head = nn.Linear(32, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        result: Tensor = self.head((self.body(a) - self.body(b)).abs())
        return result


class GraphNetwork(nn.Module):
    """Graph convolutions A X W with a bare parameter W (arXiv 1609.02907)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(16, width) * 0.1)
        self.second = nn.Parameter(torch.randn(width, width) * 0.1)
        self.third = nn.Parameter(torch.randn(width, width) * 0.1)
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        for weight in (self.first, self.second, self.third):
            x = (adjacency @ (x @ weight)).relu()
        result: Tensor = self.head(x.mean(1))
        return result


class BilinearScore(nn.Module):
    """A bilinear layer over two encodings."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, width), nn.Linear(16, width)
        self.mixed, self.score = nn.Linear(width, width), nn.Bilinear(width, width, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        result: Tensor = self.score(self.mixed(self.a(a).relu()), self.b(b))
        return result


class RadianceField(nn.Module):
    """Layers over Fourier features of points, with a skip (NeRF, arXiv 2003.08934)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.near = nn.Sequential(nn.Linear(24, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.far = nn.Sequential(nn.Linear(width + 24, width), nn.ReLU(), nn.Linear(width, 4))

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.cat([x * 2.0**power for power in range(4)], 1)
        features = torch.cat([angles.sin(), angles.cos()], 1)
        result: Tensor = self.far(torch.cat([self.near(features), features], 1))
        return result
