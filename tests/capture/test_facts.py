"""First, last, non-negative inputs and positions."""

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.capture import capture_model
from nmcompile.ir.captured import Captured

X = torch.randn(2, 8)


def ends(captured: Captured) -> tuple[set[str], set[str]]:
    facts = captured.facts
    return {name for name in facts if facts[name].first}, {name for name in facts if facts[name].last}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.norm(h + self.b(h.relu()))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.aux, self.boxes, self.classes = (nn.Linear(8, n) for n in (8, 8, 4, 3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.stem(x).relu()
        return {"boxes": self.boxes(h).sigmoid(), "classes": self.classes(h)}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.gelu(self.fc(self.embed(ids))))


class Opaque(nn.Module):
    """fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


@pytest.mark.parametrize("args", [None, (X,)], ids=["fx", "export"])
def test_residual_encoder_has_no_last(args: tuple[Tensor] | None) -> None:
    assert ends(capture_model(Residual(), args)) == ({"a"}, set())


@pytest.mark.parametrize("args", [None, (X,)], ids=["fx", "export"])
def test_every_head_is_last_and_a_layer_that_is_not_called_is_not(args: tuple[Tensor] | None) -> None:
    assert ends(capture_model(Heads(), args)) == ({"stem"}, {"boxes", "classes"})


@pytest.mark.parametrize("args", [None, (torch.ones(2, 3, dtype=torch.long),)], ids=["fx", "export"])
def test_an_embedding_stands_before_the_first_layer(args: tuple[Tensor] | None) -> None:
    assert ends(capture_model(Encoder(), args)) == (set(), {"head"})


@pytest.mark.parametrize("args", [None, (torch.randn(5, 2, 8),)], ids=["fx", "export"])
def test_attention_at_both_ends(args: tuple[Tensor] | None) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    captured = capture_model(Attends(), args)
    assert ends(captured) == ({"attention.in_proj"}, {"attention.out_proj"})
    assert captured.facts["attention.in_proj"].positions == (10 if args else None)


def test_without_a_whole_graph_names_decide() -> None:
    class Net(Opaque):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv1d(3, 8, 3), nn.Linear(8, 5)

    captured = capture_model(Net())
    assert captured.whole is None
    assert captured.whole_reason.endswith("passing args= helps")
    assert ends(captured) == ({"stem"}, {"head"})
    assert ends(capture_model(Opaque())) == (set(), set())


def test_a_child_that_cannot_be_traced_is_one_node_of_the_whole_graph() -> None:
    captured = capture_model(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Opaque(), nn.Linear(8, 3)))
    assert captured.whole is not None
    assert list(captured.whole.layers.values()) == [("0",), ("2.fc",), ("3",)]
    assert ends(captured) == ({"0"}, {"3"})
    assert not captured.facts["2.fc"].nonnegative
    assert [node.target for node in captured.whole.layers] == ["0", "2", "3"]


def test_export_sees_what_fx_cannot_and_counts_positions() -> None:
    captured = capture_model(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU()), (torch.randn(2, 3, 9, 9),))
    assert captured.whole is not None
    assert captured.whole.source == "export"
    assert captured.facts["0"].positions == 2 * 4 * 4


def subtracted(x: Tensor) -> Tensor:
    h = x.relu()
    h.sub_(1)
    return h


def masked(x: Tensor) -> Tensor:
    h = x.relu()
    h.masked_fill_(h == 0, -1)
    return h


def copied(x: Tensor) -> Tensor:
    h = x.relu()
    h.copy_(x)
    return h


def augmented(x: Tensor) -> Tensor:
    h = g = x.relu()
    h -= 1
    return g


def with_negative_item(x: Tensor) -> Tensor:
    h = x.relu()
    h[:, 0] = -1
    return h


def written_out(x: Tensor) -> Tensor:
    h = x.relu()
    torch.sub(h, 1, out=h)
    return h


def activated(x: Tensor) -> Tensor:
    h = x.sigmoid()
    F.elu(F.elu(h.sub_(1), 1.0, True), inplace=True)
    return h


def chunk_negated(x: Tensor) -> Tensor:
    h = x.relu()
    h.chunk(2, -1)[0].neg_()
    return h


def view_subtracted(x: Tensor) -> Tensor:
    h = x.relu()
    h.view(-1).flatten().sub_(1)
    return h


def detached_subtracted(x: Tensor) -> Tensor:
    h = x.relu()
    h.detach().sub_(1)
    return h


def data_subtracted(x: Tensor) -> Tensor:
    h = x.relu()
    h.data.sub_(1)
    return h


def base_subtracted(x: Tensor) -> Tensor:
    h = x.relu()
    g = h.unsqueeze(0).squeeze(0)
    h.sub_(1)
    return g


def rectified_base_subtracted(x: Tensor) -> Tensor:
    g = F.relu(x, inplace=True)
    x.sub_(1)
    return g


def subtracted_without_gradients(x: Tensor) -> Tensor:
    h = x.relu()
    with torch.no_grad():
        h.sub_(1)
    return h


def subtracted_from_a_column(x: Tensor) -> Tensor:
    h = x.relu()
    h.t()[0].index_fill_(0, torch.tensor([0]), -1.0)
    return h.clone()


def residual(x: Tensor) -> Tensor:
    """As ResNets write it: the identity is read after the branch has begun, the sum and its ReLU are in place."""
    h = F.relu_(x * 1)
    branch = F.relu(h * -1, inplace=True) - 0.1
    branch += h
    return F.relu_(branch) + h


def added(x: Tensor) -> Tensor:
    h = x.relu()
    h += 1
    h /= 2
    h.add_(x.sigmoid()).mul_(2)
    return h.clamp_(min=0)


NONNEGATIVE: list[Callable[[Tensor], Tensor]] = [
    lambda x: F.relu(x),
    lambda x: x.relu_(),
    lambda x: torch.sigmoid(x).flatten(1).unsqueeze(1).squeeze(1),
    lambda x: F.softmax(x, -1) * F.relu6(x),
    lambda x: torch.cat([x.abs(), x.square()], -1)[:, :8],
    lambda x: x.clamp(min=0).chunk(2, -1)[0].repeat(1, 2),
    lambda x: torch.clamp(x, 0, 3) + x.exp(),
    lambda x: F.max_pool1d(F.hardsigmoid(x), 3, 1, 1),
    lambda x: F.pad(F.adaptive_avg_pool1d(F.relu(x), 6), (1, 1)),
    lambda x: F.dropout(x * x, 0.1, False).view(-1, 8).t().contiguous().t(),
    residual,
    added,
]
UNPROVEN: list[Callable[[Tensor], Tensor]] = [
    lambda x: x,
    lambda x: F.relu(x) - 1,
    lambda x: F.relu(x) + x,
    lambda x: torch.cat([F.relu(x), x], -1)[:, :8],
    lambda x: F.gelu(x),
    lambda x: x.clamp(min=-1),
    lambda x: x.clamp(max=1),
    lambda x: F.pad(F.relu(x)[:, :6], (1, 1), value=-1.0),
    lambda x: F.relu(x) * -1,
    lambda x: F.hardtanh(x),
    subtracted,
    masked,
    copied,
    augmented,
    with_negative_item,
    written_out,
    activated,
    chunk_negated,
    view_subtracted,
    detached_subtracted,
    data_subtracted,
    base_subtracted,
    rectified_base_subtracted,
    subtracted_without_gradients,
    subtracted_from_a_column,
]


class Applies(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.a, self.b = function, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)))


@pytest.mark.parametrize("args", [None, (X,)], ids=["fx", "export"])
@pytest.mark.parametrize(
    ("function", "expected"), [(f, True) for f in NONNEGATIVE] + [(f, False) for f in UNPROVEN], ids=lambda _: ""
)
def test_nonnegative(function: Callable[[Tensor], Tensor], expected: bool, args: tuple[Tensor] | None) -> None:
    model = Applies(function)
    facts = capture_model(model, args).facts
    assert facts["b"].nonnegative == expected
    assert not facts["a"].nonnegative
    if expected:
        assert (function(model.a(X)) >= 0).all()


def test_nonnegative_through_modules() -> None:
    keeps = (nn.ReLU6(), nn.MaxPool1d(3), nn.Dropout(), nn.Flatten(), nn.Identity(), nn.ConstantPad1d(1, 0.0))
    model = nn.Sequential(nn.Conv1d(4, 8, 3), *keeps, nn.Linear(18, 2), nn.Hardtanh(0, 1), nn.Linear(2, 2))
    facts = capture_model(model).facts
    assert facts["7"].nonnegative
    assert facts["9"].nonnegative
    assert not facts["0"].nonnegative


class WritesOnItsInput(nn.Module):
    """fx cannot trace it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(1) if x.sum() > 0 else x


class Shares(nn.Module):
    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child, self.a, self.b = child, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        self.child(h)
        return self.b(h)


@pytest.mark.parametrize("args", [None, (X,)], ids=["fx", "export"])
@pytest.mark.parametrize(
    ("child", "expected"),
    [
        (nn.Tanh(), True),
        (nn.ReLU(inplace=True), True),
        (nn.Dropout(inplace=True), True),
        (nn.Sequential(nn.Flatten(0), nn.ReLU6(inplace=True)), True),
        (nn.ELU(inplace=True), False),
        (nn.Hardtanh(inplace=True), False),
        (nn.Sequential(nn.Flatten(0), nn.LeakyReLU(inplace=True)), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_modules_that_work_in_place(child: nn.Module, expected: bool, args: tuple[Tensor] | None) -> None:
    assert capture_model(Shares(child), args).facts["b"].nonnegative == expected


def test_code_that_is_not_known_may_write_to_its_inputs() -> None:
    captured = capture_model(Shares(WritesOnItsInput()))
    assert captured.whole is not None
    assert not captured.facts["b"].nonnegative


def test_a_written_item_in_a_graph_by_hand() -> None:
    root = nn.Module()
    root.a, root.b = nn.Linear(8, 8), nn.Linear(8, 8)
    graph = fx.Graph()
    h = graph.call_method("relu", (graph.call_module("a", (graph.placeholder("x"),)),))
    graph.call_function(operator.setitem, (h, 0, -1.0))
    graph.output(graph.call_module("b", (h,)))
    assert not capture_model(fx.GraphModule(root, graph)).facts["b"].nonnegative


def relu(x: Tensor) -> Tensor:
    return -x


fx.wrap("relu")


def test_a_function_of_the_model_is_not_the_operator_of_its_name() -> None:
    assert not capture_model(Applies(relu)).facts["b"].nonnegative


def test_a_layer_after_a_write_reads_what_was_written() -> None:
    model = Applies(masked)
    compiled = nmcompile.compile(model, "activations", config=CompileConfig(ends="sparse"))
    torch.testing.assert_close(compiled(X), model(X))
