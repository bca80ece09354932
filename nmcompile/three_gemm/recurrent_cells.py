"""One step of a recurrent layer from the gates of its input and of its state, and the cells that make one step."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from nmcompile.three_gemm.modules import ThreeGemm

State = tuple[Tensor, ...]
"""The hidden state (batch, hidden or proj_size), and for an LSTM the cell's (batch, hidden)."""


def lstm_cell(x: Tensor, h: Tensor, state: State) -> State:
    """Return the next state from the gates of the input and of the state, (batch, 4 hidden) each."""
    i, f, g, o = (x + h).chunk(4, 1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def gru_cell(x: Tensor, h: Tensor, state: State) -> State:
    """Return the next state from the gates of the input and of the state, (batch, 3 hidden) each."""
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, 1), h.chunk(3, 1)
    z, n = (x_z + h_z).sigmoid(), (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
    return (n + z * (state[0] - n),)


def tanh_cell(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).tanh(),)


def relu_cell(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).relu(),)


CELLS: dict[str, Callable[[Tensor, Tensor, State], State]] = {
    "LSTM": lstm_cell,
    "GRU": gru_cell,
    "RNN_TANH": tanh_cell,
    "RNN_RELU": relu_cell,
}


class ThreeGemmCell(ThreeGemm):
    """`nn.LSTMCell`, `nn.GRUCell` or `nn.RNNCell` whose weights are layers, by their names."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    hidden_size: int

    def forward(self, input: Tensor, hx: Tensor | State | None = None) -> Tensor | State:
        """Run as torch's own: (batch, in) or (in,)."""
        x = input.unsqueeze(0) if input.dim() == 1 else input
        kind = self._kind
        if hx is None:
            zeros = x.new_zeros(len(x), self.hidden_size)
            state: State = (zeros, zeros) if kind == "LSTM" else (zeros,)
        else:
            state = tuple(one.reshape(len(x), -1) for one in ((hx,) if isinstance(hx, Tensor) else hx))
        gates = run_role(self, "weight_ih", x, self.weight_ih, self.bias_ih)
        new = CELLS[kind](gates, run_role(self, "weight_hh", state[0], self.weight_hh, self.bias_hh), state)
        new = tuple(one.squeeze(0) for one in new) if input.dim() == 1 else new
        return new if kind == "LSTM" else new[0]

    @property
    def _kind(self) -> str:
        if isinstance(self, nn.RNNCell):
            return f"RNN_{self.nonlinearity.upper()}"
        return "LSTM" if isinstance(self, nn.LSTMCell) else "GRU"


def run_role(module: ThreeGemm, role: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run the layer of a role; F.linear if the plan leaves it alone."""
    return module.three_gemms[role](x, weight, bias) if role in module.three_gemms else F.linear(x, weight, bias)
