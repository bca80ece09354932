"""Real architectures, with and without example inputs."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nmcompile.capture import capture_model
from nmcompile.errors import CaptureError
from nmcompile.ir.captured import Captured

IMAGE = torch.randn(1, 3, 64, 64)
IDS = torch.ones(2, 8, dtype=torch.long)
TINY = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": 50}


def vision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        models = pytest.importorskip("torchvision.models")
        return models.video.r3d_18() if name == "r3d_18" else getattr(models, name)(weights=None, **options)

    return make


def hugging_face(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        kind = getattr(transformers, name)
        return kind(kind.config_class(**options))

    return make


RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 4}
CASES = [
    ("resnet18", vision("resnet18"), (IMAGE,), 21, {"conv1"}, {"fc"}, True),
    ("mobilenet_v2", vision("mobilenet_v2"), (IMAGE,), 53, {"features.0.0"}, {"classifier.1"}, True),
    ("vit_b_16", vision("vit_b_16", image_size=64), (IMAGE,), 50, {"conv_proj"}, {"heads.head"}, True),
    ("densenet121", vision("densenet121"), (IMAGE,), 121, {"features.conv0"}, {"classifier"}, True),
    ("r3d_18", vision("r3d_18"), (torch.randn(1, 3, 4, 32, 32),), 21, {"stem.0"}, {"fc"}, True),
    ("bert", hugging_face("BertForSequenceClassification", **TINY), (IDS,), 14, set(), {"classifier"}, False),
    (
        "gpt2",
        hugging_face("GPT2LMHeadModel", n_embd=16, n_layer=2, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0),
        (IDS,),
        9,
        set(),
        {"lm_head"},
        False,
    ),
    (
        "hf_resnet",
        hugging_face("ResNetForImageClassification", **RESNET),
        (IMAGE,),
        9,
        {"resnet.embedder.embedder.convolution"},
        {"classifier.1"},
        False,
    ),
]


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, [(type(m), m.training, list(m.__dict__)) for m in model.modules()], torch.get_rng_state()


def assert_unchanged(model: nn.Module, before: tuple[Any, ...]) -> None:
    tensors, modules, drawn = snapshot(model)
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in tensors.items())
    assert modules == before[1]
    assert torch.equal(drawn, before[2])


def ends(captured: Captured) -> tuple[set[str], set[str]]:
    facts = captured.facts
    return {name for name in facts if facts[name].first}, {name for name in facts if facts[name].last}


@pytest.mark.parametrize(
    ("make", "args", "count", "first", "last", "fx_traces"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_architectures(
    make: Callable[[], nn.Module], args: tuple[Tensor], count: int, first: set[str], last: set[str], fx_traces: bool
) -> None:
    model = make().train()
    before = snapshot(model)
    without = capture_model(model)
    assert len(without.sites) == count
    assert ends(without) == (first, last)
    assert (without.whole is not None) == fx_traces
    assert_unchanged(model, before)
    captured = capture_model(model, args)
    assert captured.sites == without.sites
    assert captured.whole is not None
    assert captured.whole.source == "export"
    assert ends(captured) == (first, last)
    assert all(fact.positions for fact in captured.facts.values())
    assert {name for names in captured.whole.layers.values() for name in names} == set(captured.facts)
    assert_unchanged(model, before)


@pytest.mark.parametrize("args", [None, (IMAGE,)], ids=["fx", "export"])
def test_resnet_inputs_after_relu(args: tuple[Tensor] | None) -> None:
    facts = capture_model(vision("resnet18")(), args).facts
    assert not facts["conv1"].nonnegative
    assert all(fact.nonnegative for name, fact in facts.items() if name != "conv1")


def test_capture_is_faster_than_export(capsys: pytest.CaptureFixture[str]) -> None:
    model = vision("resnet50")().eval()
    start = time.perf_counter()
    capture_model(model)
    captured = time.perf_counter()
    torch.export.export(model, (IMAGE,), strict=False)
    exported = time.perf_counter()
    with capsys.disabled():
        print(f" resnet50: capture {captured - start:.2f} s, torch.export {exported - captured:.2f} s")


def test_refused_args_are_an_error_with_their_shapes() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    args = (torch.randn(2, 5),)
    before = snapshot(model)
    with pytest.raises(CaptureError, match=r"Sequential does not accept args=\(float32\[2, 5\],\)") as caught:
        capture_model(model, args)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert_unchanged(model, before)


def test_export_failure_falls_back_to_the_stitched_graph(capsys: pytest.CaptureFixture[str]) -> None:
    class Inspects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.part, self.head = nn.BatchNorm1d(4), Branch(), nn.Linear(4, 2)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.head(self.part(self.norm(x)))

    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.rand(1)
            return x if float(x.sum()) > 0 else -x

    model, args = Inspects(), (torch.randn(2, 4),)
    before = snapshot(model)
    captured = capture_model(model, args)
    assert capsys.readouterr() == ("", "")
    assert captured.whole is not None
    assert captured.whole.source == "fx"
    assert captured.whole_reason.startswith("torch.export failed (")
    assert model.calls == 0
    assert_unchanged(model, before)


def test_a_hugging_face_transformer_needs_args_for_its_whole_graph() -> None:
    captured = capture_model(CASES[5][1]())
    assert captured.whole_reason.startswith("BertForSequenceClassification.forward cannot be traced (")
    assert captured.whole_reason.endswith("passing args= helps")
