"""First, last, non-negative inputs and positions."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from transformers import CLIPConfig, CLIPModel, DebertaV2Config, DebertaV2ForSequenceClassification

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
    """A module that fx cannot trace."""

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


def test_without_any_graph_names_decide() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.fc, self.head = nn.Conv1d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(x.dim()):
                x = self.stem(x)
            return x

    captured = capture_model(Net())
    assert captured.whole is None
    assert captured.whole_reason.endswith("passing args= helps")
    assert ends(captured) == ({"stem"}, {"head"})


class ChecksShape(nn.Module):
    """A check, then a branch that depends on a value, then one in a child."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), Opaque(), nn.Linear(8, 8)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        if x.shape[-1] != 8:
            raise ValueError("wrong width")
        if not x.is_floating_point():
            raise TypeError("no floats")
        if x.ndim == 1:
            x = x[None]
        return self.c(self.b(self.a(x)).relu()) * scale


def test_an_outline_finds_the_ends_behind_checks_and_proves_nothing() -> None:
    captured = capture_model(ChecksShape())
    assert captured.whole is None and captured.whole_reason.endswith("passing args= helps")
    assert ends(captured) == ({"a"}, {"c"})
    assert not any(facts.nonnegative or facts.rectified or facts.readers for facts in captured.facts.values())
    assert ends(capture_model(ChecksShape(), (X,))) == ({"a"}, {"c"})
    assert ends(capture_model(Opaque())) == ({"fc"}, {"fc"})


@pytest.mark.parametrize("wait", ["while not", "if break", "never"])
def test_an_outline_ends_where_a_loop_waits_for_a_value(wait: str) -> None:
    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            while not x.sum() > 0 if wait != "if break" else True:
                x = x + 1
                if (wait == "never" and x.sum() > 1e9) or (wait == "if break" and x.sum() > 0):
                    break
            return self.b(x)

    assert ends(capture_model(Waits())) == ({"a"}, {"b"})


def test_shapes_and_parameters_are_no_model_inputs() -> None:
    class Biased(nn.Module):
        """A module like DeBERTa: a layer reads a parameter, whose rows are chosen by the length of the input."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(16, 8))
            self.bias, self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x) + self.bias(self.table[: x.shape[0]] * 1.0)
            return self.head(y) * y.shape[0]

    for args in (None, (X,)):
        assert ends(capture_model(Biased(), args)) == ({"fc"}, {"head"})


def small_models() -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    """Return models that fx cannot trace as a whole, each with an example."""
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = tower | {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2}
    tokens, image = torch.randint(3, 30, (2, 5)), torch.randn(2, 3, 8, 8)
    clip = CLIPConfig(text_config=text, vision_config=tower | {"image_size": 8, "patch_size": 4}, projection_dim=16)
    deberta: dict[str, Any] = tower | {"vocab_size": 32, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    encoder = nn.Transformer(16, 2, 1, 1, 32, batch_first=True).eval()
    return {
        "clip": (CLIPModel(clip).eval(), {"input_ids": tokens, "pixel_values": image}),
        "deberta": (DebertaV2ForSequenceClassification(DebertaV2Config(**deberta)).eval(), {"input_ids": tokens}),
        "transformer": (encoder, {"src": torch.randn(2, 5, 16), "tgt": torch.randn(2, 5, 16)}),
    }


@pytest.mark.parametrize("name", ["clip", "deberta", "transformer"])
def test_the_ends_of_real_models_are_found_without_args(name: str) -> None:
    model, example = small_models()[name]
    guessed, known = capture_model(model), capture_model(model, None, example)
    assert guessed.whole is None and known.whole is not None
    assert ends(guessed) == ends(known)
    assert ends(known) != (set(), set())


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
    """Write a ResNet's block: the identity is read after the branch has begun, the sum and its ReLU are in place."""
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
    """A module that fx cannot trace."""

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
