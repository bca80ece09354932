"""Networks of sequences: recurrent, state space, attention, encoder-decoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.sweep.architecture import VOCABULARY


class Recurrent(nn.Module):
    """A language model with torch's own recurrent layers."""

    def __init__(self, kind: type[nn.RNNBase], width: int = 32, bidirectional: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.rnn = kind(width, width, num_layers=2, batch_first=True, bidirectional=bidirectional)  # type: ignore[call-arg]
        wide = 2 * width if bidirectional else width
        self.mixed, self.head = nn.Linear(wide, width), nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.mixed(self.rnn(self.embedding(x))[0]).relu())
        return result


class Cells(nn.Module):
    """A loop over `nn.LSTMCell` or `nn.GRUCell`."""

    def __init__(self, kind: type[nn.RNNCellBase], width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.embedding, self.cell = nn.Embedding(VOCABULARY, width), kind(width, width)  # type: ignore[call-arg]
        self.mixed, self.head = nn.Linear(width, width), nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        zero = torch.zeros(x.shape[0], self.width)
        state, outputs = (zero, zero) if isinstance(self.cell, nn.LSTMCell) else zero, []
        for token in self.embedding(x).unbind(1):
            state = self.cell(token, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        result: Tensor = self.head(self.mixed(torch.stack(outputs, 1)).relu())
        return result


class WrittenGates(nn.Module):
    """An LSTM whose gates are two linear layers, written out."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.of_input, self.of_state = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width, bias=False)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros(x.shape[0], self.width)
        outputs = []
        for token in self.embedding(x).unbind(1):
            i, f, g, o = (self.of_input(token) + self.of_state(h)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            outputs.append(h := o.sigmoid() * c.tanh())
        result: Tensor = self.head(torch.stack(outputs, 1))
        return result


class StateSpace(nn.Module):
    """A selective state space block, its scan written as a loop (arXiv 2312.00752)."""

    def __init__(self, width: int = 32, states: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.enter, self.leave = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)
        self.conv = nn.Conv1d(2 * width, 2 * width, 4, padding=3, groups=2 * width)
        self.select, self.step = nn.Linear(2 * width, 2 * states + 8), nn.Linear(8, 2 * width)
        self.log_decay = nn.Parameter(torch.arange(1.0, states + 1).log().expand(2 * width, states).clone())
        self.states, self.head = states, nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x, gate = self.enter(self.embedding(tokens)).chunk(2, 2)
        x = F.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        b, c, low = self.select(x).split([self.states, self.states, 8], 2)
        step = F.softplus(self.step(low))
        decay = (step[..., None] * -self.log_decay.exp()).exp()
        inputs = step[..., None] * b[:, :, None] * x[..., None]
        h, outputs = torch.zeros_like(inputs[:, 0]), []
        for a, u, one in zip(decay.unbind(1), inputs.unbind(1), c.unbind(1), strict=True):
            h = a * h + u
            outputs.append((h * one[:, None]).sum(2))
        result: Tensor = self.head(self.leave(torch.stack(outputs, 1) * F.silu(gate)))
        return result


class ConvolvedStates(nn.Module):
    """A diagonal state space layer as a long convolution by FFT (S4D, arXiv 2206.11893)."""

    def __init__(self, width: int = 32, states: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.decay, self.read = nn.Parameter(torch.rand(width, states)), nn.Parameter(torch.randn(width, states))
        self.mixed, self.head = nn.Linear(width, 2 * width), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        x, length = self.first(x).transpose(1, 2), x.shape[1]
        kernel = (self.read[..., None] * (-self.decay[..., None] * torch.arange(length)).exp()).sum(1)
        y = torch.fft.irfft(torch.fft.rfft(x, 2 * length) * torch.fft.rfft(kernel, 2 * length))[..., :length]
        result: Tensor = self.head(F.glu(self.mixed(F.gelu(y).transpose(1, 2)), 2).mean(1))
        return result


class EinsumAttention(nn.Module):
    """Attention whose weights are bare parameters: `x @ W`, `einsum`, and a weight with a dim for the heads."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(16, width), (width // heads) ** -0.5
        self.query = nn.Parameter(torch.randn(width, width) * 0.1)
        self.key = nn.Parameter(torch.randn(width, width) * 0.1)
        self.value = nn.Parameter(torch.randn(width, heads, width // heads) * 0.1)
        self.out = nn.Parameter(torch.randn(heads, width // heads, width) * 0.1)
        self.heads, self.head = heads, nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        q = (x @ self.query).unflatten(2, (self.heads, -1))
        k = torch.einsum("bti,io->bto", x, self.key).unflatten(2, (self.heads, -1))
        v = torch.einsum("bti,ihd->bthd", x, self.value)
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(self.scale).softmax(3)
        h = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        result: Tensor = self.head(x + torch.einsum("bqhd,hdo->bqo", h, self.out))
        return result


class Seq2Seq(nn.Module):
    """A recurrent encoder-decoder with attention (arXiv 1409.0473)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.encoder, self.decoder = nn.GRU(width, width, batch_first=True), nn.GRU(width, width, batch_first=True)
        self.query, self.mixed = nn.Linear(width, width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, state = self.encoder(self.embedding(source))
        h, _ = self.decoder(self.embedding(target), state)
        read = (self.query(h) @ memory.transpose(1, 2)).softmax(2) @ memory
        result: Tensor = self.head(self.mixed(torch.cat([h, read], 2)).tanh())
        return result


class Conformer(nn.Module):
    """A block of attention and convolution over spectrograms (arXiv 2005.08100)."""

    def __init__(self, mels: int = 16, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(mels, width)
        self.before = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.gated, self.depthwise = nn.Conv1d(width, 2 * width, 1), nn.Conv1d(width, width, 5, padding=2, groups=width)
        self.norm, self.pointwise = nn.BatchNorm1d(width), nn.Conv1d(width, width, 1)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.before(x) / 2
        x = x + self.attention(x, x, x, need_weights=False)[0]
        h = self.depthwise(F.glu(self.gated(x.transpose(1, 2)), 1))
        x = x + self.pointwise(F.silu(self.norm(h))).transpose(1, 2)
        result: Tensor = self.head(x).log_softmax(2)
        return result


def transformer() -> nn.Module:
    """Return torch's own encoder-decoder."""
    return nn.Transformer(32, 4, 2, 2, 64, batch_first=True)
