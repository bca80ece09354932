"""Recurrent layers whose gates are linear layers: one product for all inputs, and one for the state in each step.

torch's own forward is one fused kernel, which knows no masks.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from nmcompile.three_gemm.modules import ThreeGemm
from nmcompile.three_gemm.recurrent_cells import CELLS, State, run_role


class _Sequences(NamedTuple):
    """Sequences, the longest first: `data` (sum of lengths, features), and how many of them have each step."""

    data: Tensor
    sizes: Sequence[int]


class ThreeGemmRecurrent(ThreeGemm):
    """`nn.LSTM`, `nn.GRU` or `nn.RNN` whose weights are layers, by their names.

    A weight that the plan leaves alone has no triple and is multiplied as ever.
    """

    mode: str
    bias: bool
    batch_first: bool
    bidirectional: bool
    num_layers: int
    hidden_size: int
    proj_size: int
    dropout: float
    training: bool
    check_forward_args: Callable[..., None]  # torch's own

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | State | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor | State]:
        """Run as torch's own: (length, batch, in), (batch, length, in) with `batch_first`, (length, in) or packed."""
        sequences, is_batched = self._sequences(input)
        first = self._first_states(hx, sequences, is_batched)
        state = tuple(first) if self.mode == "LSTM" else first[0]
        self.check_forward_args(sequences.data, state, torch.tensor(sequences.sizes))
        if isinstance(input, PackedSequence):
            first = [_select(one, input.sorted_indices) for one in first]
        dtype = self._dtype_of(sequences.data)
        data, first, last = sequences.data.to(dtype), [one.to(dtype) for one in first], list[State]()
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(1 + self.bidirectional):
                number = len(last)
                state = tuple(one[number] for one in first)
                output, final = self._run_direction(layer, direction, _Sequences(data, sequences.sizes), state)
                outputs.append(output)
                last.append(final)
            data = torch.cat(outputs, 1)
            if layer + 1 < self.num_layers:
                data = F.dropout(data, self.dropout, self.training)
        return self._results(
            input, data, sequences, [torch.stack(ones) for ones in zip(*last, strict=True)], is_batched
        )

    def _sequences(self, input: Tensor | PackedSequence) -> tuple[_Sequences, bool]:
        if isinstance(input, PackedSequence):
            return _Sequences(input.data, input.batch_sizes.tolist()), True
        is_batched = input.dim() == 3
        x = input if is_batched else input.unsqueeze(1)
        x = x.transpose(0, 1) if self.batch_first and is_batched else x
        if not x.shape[0]:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")  # as torch's kernel says
        return _Sequences(x.flatten(0, 1), [x.shape[1]] * x.shape[0]), is_batched

    def _dtype_of(self, x: Tensor) -> torch.dtype:
        """Return the type of the results: autocast casts all for cuDNN's kernels, and for oneDNN's LSTM."""
        device = x.device.type
        is_cast = device != "cpu" or (self.mode == "LSTM" and not self.proj_size)
        return torch.get_autocast_dtype(device) if is_cast and torch.is_autocast_enabled(device) else x.dtype

    def _first_states(self, hx: Tensor | State | None, sequences: _Sequences, is_batched: bool) -> list[Tensor]:
        """Return the first states of all layers and directions, (layers, batch, features) each."""
        widths = [self.proj_size or self.hidden_size] + [self.hidden_size] * (self.mode == "LSTM")
        count = self.num_layers * (1 + self.bidirectional)
        if hx is None:
            return [sequences.data.new_zeros(count, sequences.sizes[0], width) for width in widths]
        given = (hx,) if isinstance(hx, Tensor) else hx
        return [one if is_batched else one.unsqueeze(1) for one in given]

    def _run_direction(self, layer: int, direction: int, sequences: _Sequences, state: State) -> tuple[Tensor, State]:
        """Return the outputs of all steps, and the last state of each sequence."""
        suffix = f"_l{layer}" + "_reverse" * direction
        gates = self._linear("ih", suffix, sequences.data)
        outputs = list[Tensor]()
        steps = list(zip(accumulate(sequences.sizes, initial=0), sequences.sizes, strict=False))
        for start, size in reversed(steps) if direction else steps:
            present = tuple(one[:size] for one in state)
            new = CELLS[self.mode](gates[start : start + size], self._linear("hh", suffix, present[0]), present)
            if self.proj_size:
                new = (self._linear("hr", suffix, new[0]), *new[1:])
            outputs.append(new[0])
            state = tuple(
                torch.cat([n, one[size:]]) if size < len(one) else n for n, one in zip(new, state, strict=True)
            )
        return torch.cat(outputs[::-1] if direction else outputs), state

    def _linear(self, kind: str, suffix: str, x: Tensor) -> Tensor:
        weight = getattr(self, f"weight_{kind}{suffix}")
        bias = getattr(self, f"bias_{kind}{suffix}") if self.bias and kind != "hr" else None
        return run_role(self, f"weight_{kind}{suffix}", x, weight, bias)

    def _results(
        self,
        input: Tensor | PackedSequence,
        data: Tensor,
        sequences: _Sequences,
        last: list[Tensor],
        is_batched: bool,
    ) -> tuple[Tensor | PackedSequence, Tensor | State]:
        if isinstance(input, PackedSequence):
            packed = PackedSequence(data, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
            return packed, self._state([_select(one, input.unsorted_indices) for one in last])
        output = data.unflatten(0, (len(sequences.sizes), -1))
        if not is_batched:
            return output.squeeze(1), self._state([one.squeeze(1) for one in last])
        return output.transpose(0, 1) if self.batch_first else output, self._state(last)

    def _state(self, last: list[Tensor]) -> Tensor | State:
        return tuple(last) if self.mode == "LSTM" else last[0]


def _select(x: Tensor, indices: Tensor | None) -> Tensor:
    return x if indices is None else x.index_select(1, indices)
