"""Recurrent layers: dense in one fused kernel by default; if they are named, their gates are layers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import nmcompile
from nmcompile import CompileConfig, LayerConfig
from nmcompile.pruning import transposable_mask

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights"),  # torch.export's
]
STEPS, BATCH, IN, HIDDEN = 5, 3, 8, 12
Make = dict[str, Any]
NETS: dict[str, tuple[type[nn.LSTM | nn.GRU | nn.RNN], Make]] = {
    "LSTM": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "LSTM, batch first": (nn.LSTM, {"batch_first": True}),
    "LSTM with projections": (nn.LSTM, {"proj_size": 4, "num_layers": 2}),
    "GRU": (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "RNN": (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
    "RNN without biases": (nn.RNN, {"bias": False}),
}
CELLS: dict[str, nn.RNNCellBase] = {
    "LSTM": nn.LSTMCell(IN, HIDDEN),
    "GRU": nn.GRUCell(IN, HIDDEN, bias=False),
    "tanh": nn.RNNCell(IN, HIDDEN),
    "relu": nn.RNNCell(IN, HIDDEN, nonlinearity="relu"),
}


def named(mode: str) -> CompileConfig:
    """Return a config that names every weight."""
    return CompileConfig(layers={"re:.*weight_.*": nmcompile.presets[mode]})


def made(name: str) -> nn.RNNBase:
    kind, options = NETS[name]
    net = kind(IN, HIDDEN, **options)
    for weight in (p for p in net.parameters() if p.dim() > 1):
        nn.init.normal_(weight, std=0.4)
    return net


def flat(result: Any) -> list[Tensor]:
    output, state = result
    output = output.data if isinstance(output, PackedSequence) else output
    return [output, *(state if isinstance(state, tuple) else (state,))]


def gradients(net: nn.Module, *inputs: Any) -> list[Tensor]:
    """Return the results, and the gradients of all parameters."""
    net.zero_grad()
    results = flat(net(*inputs))
    torch.stack([one.sin().sum() for one in results]).sum().backward()
    return [*(one.detach() for one in results), *(p.grad for p in net.parameters() if p.grad is not None)]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def inputs(net: nn.RNNBase) -> dict[str, tuple[Any, ...]]:
    """Return inputs of each kind that torch's own forward takes."""
    x = torch.randn(STEPS, BATCH, IN)
    count, width = net.num_layers * (1 + net.bidirectional), net.proj_size or HIDDEN
    h, c = torch.randn(count, BATCH, width), torch.randn(count, BATCH, HIDDEN)
    state, of_one = ((h, c), (h[:, 0], c[:, 0])) if net.mode == "LSTM" else (h, h[:, 0])
    lengths = torch.tensor([2, STEPS, 3])
    padded = x.transpose(0, 1) if net.batch_first else x
    packed = pack_padded_sequence(padded, lengths, batch_first=net.batch_first, enforce_sorted=False)
    return {"padded": (padded,), "with a state": (padded, state), "one": (x[:, 0], of_one), "packed": (packed, state)}


@pytest.mark.parametrize("name", NETS)
def test_it_stays_the_fused_kernel_unless_it_is_named(name: str) -> None:
    compiled = nmcompile.compile(nn.Sequential(made(name)), config=CompileConfig(ends="sparse"))
    assert type(compiled.get_submodule("0")) is NETS[name][0]
    reasons = {reason for layer in nmcompile.inspect(compiled).layers for reason in layer.reasons}
    assert len(reasons) == 1 and "its GEMMs run in one fused kernel" in reasons.pop()


@pytest.mark.parametrize("name", NETS)
def test_gates_as_layers_compute_what_the_kernel_does(name: str) -> None:
    net = made(name)
    compiled = nmcompile.compile(net, "dense", config=named("dense"))
    assert {layer.name for layer in nmcompile.inspect(compiled).layers} == set(net._parameters) - {
        one for one in net._parameters if "bias" in one
    }
    for given in inputs(net).values():
        assert_close(gradients(compiled, *given), gradients(net, *given))


@pytest.mark.parametrize("name", NETS)
def test_masked_gates_are_the_kernel_on_masked_weights(name: str) -> None:
    net, oracle = made(name), made(name)
    oracle.load_state_dict(net.state_dict())
    compiled = nmcompile.compile(net, "t-weights", config=named("t-weights"))
    for weight in (p for p in oracle.parameters() if p.dim() > 1):
        weight.data *= transposable_mask(weight.detach(), "2:4")
    for given in inputs(net).values():
        assert_close(gradients(compiled, *given), gradients(oracle, *given))
    assert nmcompile.verify(compiled).ok
    final = nmcompile.finalize(compiled)
    assert type(final) is NETS[name][0]
    assert all(torch.equal(one, other) for one, other in zip(final.parameters(), oracle.parameters(), strict=True))


def test_gradients_of_each_step_are_pruned() -> None:
    net = made("GRU")
    compiled = nmcompile.compile(net, "training", config=named("training"))
    report = nmcompile.verify(compiled, step=lambda: gradients(compiled, torch.randn(STEPS, 4, IN)))
    pruned = {check.name.partition(" ")[0] for check in report.checks if check.operand == "grad_output"}
    assert report.ok and pruned == {name for name in net._parameters if name.startswith("weight")}


@pytest.mark.parametrize("name", CELLS)
def test_cells(name: str) -> None:
    cell = CELLS[name]
    compiled = nmcompile.compile(cell, "dense", config=named("dense"))
    x, h = torch.randn(BATCH, IN), torch.randn(BATCH, HIDDEN)
    states: list[Any] = [None, (h, h.flip(0)) if name == "LSTM" else h]
    for state in states:
        for one, other in zip(_tuple(compiled(x, state)), _tuple(cell(x, state)), strict=True):
            torch.testing.assert_close(one, other)
    for one, other in zip(_tuple(compiled(x[0])), _tuple(cell(x[0])), strict=True):
        torch.testing.assert_close(one, other)
    pruned = nmcompile.compile(cell, "weights", config=named("weights"))
    final = nmcompile.finalize(pruned)
    torch.testing.assert_close(_tuple(final(x))[0], _tuple(pruned(x))[0])
    assert nmcompile.verify(pruned).ok and len(nmcompile.verify(pruned).checks) == 2


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def test_one_weight_of_several() -> None:
    net = made("LSTM")
    config = CompileConfig(layers={"weight_ih_l1": LayerConfig(weight=nmcompile.presets["weights"].weight)})
    final = nmcompile.finalize(nmcompile.compile(net, "weights", config=config))
    zeros = {name: bool((p == 0).any()) for name, p in final.named_parameters() if p.dim() > 1}
    assert [name for name, has_zeros in zeros.items() if has_zeros] == ["weight_ih_l1"]


def test_dropout_between_layers_draws_in_training_only() -> None:
    net = nn.GRU(IN, HIDDEN, num_layers=2, dropout=0.5)
    compiled, x = nmcompile.compile(net, "dense", config=named("dense")), torch.randn(STEPS, BATCH, IN)
    assert not torch.equal(flat(compiled(x))[0], flat(compiled(x))[0])
    compiled.eval()
    torch.testing.assert_close(flat(compiled(x))[0], flat(net.eval()(x))[0])


def test_a_wrong_input_is_an_error_as_in_torch() -> None:
    compiled = nmcompile.compile(made("LSTM"), "weights", config=named("weights"))
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        compiled(torch.randn(STEPS, BATCH, IN + 1))
    with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
        compiled(torch.randn(0, BATCH, IN))
    with pytest.raises(RuntimeError, match="Expected hidden"):
        compiled(torch.randn(STEPS, BATCH, IN), (torch.randn(1, BATCH, HIDDEN), torch.randn(4, BATCH, HIDDEN)))


@pytest.mark.parametrize("name", NETS)
def test_autocast_gives_results_of_the_type_that_torch_gives(name: str) -> None:
    net = made(name)
    if net.mode == "LSTM" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN, which runs LSTMs under autocast, has no bfloat16 on this processor")
    compiled, (x,) = nmcompile.compile(net, "dense", config=named("dense")), inputs(net)["padded"]
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = flat(compiled(x)), flat(net(x))
    assert [one.dtype for one in found] == [one.dtype for one in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.1)


def test_a_recurrent_layer_leaves_the_ends_of_a_model_where_they_were() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mid = nn.Embedding(16, IN), nn.Linear(IN, IN)
            self.head, self.rnn = nn.Linear(HIDDEN, 4), nn.GRU(IN, HIDDEN, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.rnn(self.mid(self.embed(x)))[0])
            return result

    for args in (None, (torch.randint(0, 16, (2, 5)),)):
        report = nmcompile.analyze(Tagger(), args=args)
        assert "last linear" in report.layer("head").reasons[0]
        assert all("recurrent" in report.layer(f"rnn.weight_{kind}_l0").reasons[0] for kind in ("ih", "hh"))


def test_a_file_holds_the_fused_layer(tmp_path: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rnn, self.mid, self.head = (
                nn.Linear(IN, IN), nn.LSTM(IN, HIDDEN, batch_first=True), nn.Linear(HIDDEN, 16), nn.Linear(16, 4)
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.mid(self.rnn(self.first(x))[0]).relu())
            return result

    x = torch.randn(2, STEPS, IN)
    model = nmcompile.compile(Net().eval(), "inference", args=(x,), calibration=[x])
    report = nmcompile.export(model, tmp_path / "model.onnx", args=(x,))
    assert {node.layer for node in report.onnx.nodes} == {"first", "mid", "head"}
