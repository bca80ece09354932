"""Parts of a model that are not in its file, and how the report says so."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim

import nmcompile
from nmcompile.backends.onnxruntime import OnnxRuntimeModel
from nmcompile.errors import ExportError

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Auxiliary(nn.Module):
    """A second head that runs in training only, as in GoogLeNet and Inception."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.middle, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.auxiliary = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Any:
        y = self.middle(self.body(x).relu()).relu()
        return (self.head(y), self.auxiliary(y)) if self.training else self.head(y)


@pytest.mark.parametrize("args", [None, (X,)])
def test_heads_that_run_in_training_only_are_not_in_the_file(args: Any, tmp_path: Path) -> None:
    model = nmcompile.compile(Auxiliary(), "weights", args=args).eval()
    report = nmcompile.export(model, tmp_path / "m.onnx", (X,))
    assert {node.layer for node in report.onnx.nodes} == {"body", "middle", "head"}
    note = "not in the file, since no output needs them in eval mode with these args: auxiliary.0, auxiliary.2"
    assert report.onnx.notes == (note,) and note in str(report)
    assert not any("auxiliary" in tensor.name for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer)
    torch.testing.assert_close(
        OnnxRuntimeModel(tmp_path / "m.onnx")(X[:2]), model(X[:2]).detach(), rtol=1e-4, atol=1e-5
    )


class Unused(Auxiliary):
    """A head whose result nothing reads, as BigBird's pooler without a classifier."""

    def forward(self, x: Tensor) -> Any:
        y = self.middle(self.body(x).relu()).relu()
        self.auxiliary(y)
        return self.head(y)


def test_layers_whose_result_nothing_reads_are_not_in_the_file(tmp_path: Path) -> None:
    model = nmcompile.compile(Unused(), "weights", args=(X,)).eval()
    report = nmcompile.export(model, tmp_path / "m.onnx", (X,))
    assert {node.layer for node in report.onnx.nodes} == {"body", "middle", "head"}
    assert report.onnx.notes[0].endswith("auxiliary.0, auxiliary.2")


def test_loops_whose_bodies_hand_out_what_was_there_before(tmp_path: Path) -> None:
    """torch.onnx writes an `EmbeddingBag` as a loop over the bags."""
    model = nn.Sequential(nn.EmbeddingBag(16, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))
    ids = torch.randint(16, (4, 6))
    compiled = nmcompile.compile(model, "weights", args=(ids,)).eval()
    nmcompile.export(compiled, tmp_path / "m.onnx", (ids,))
    onnx.checker.check_model(tmp_path / "m.onnx")
    found = OnnxRuntimeModel(tmp_path / "m.onnx")(ids[:2])
    torch.testing.assert_close(found, compiled(ids[:2]).detach(), rtol=1e-4, atol=1e-5)


class Cache:
    """An object of a class that torch.export does not know."""


@dataclass
class Result:
    logits: Tensor
    cache: Any = None
    hidden: tuple[Tensor, ...] | None = None


class Cached(nn.Module):
    """A module that returns more than tensors, in structures of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.b(self.a(x).relu()).relu()
        if self.kind == "nothing":
            return Cache()
        return (
            Result(self.c(y), [Cache(), None], (y,)) if self.kind == "dataclass" else {"a": self.c(y), "past": Cache()}
        )


@pytest.mark.parametrize(("kind", "place"), [("dataclass", "['cache'][0] (Cache)"), ("dict", "['past'] (Cache)")])
def test_objects_among_the_outputs_are_left_out_and_named(kind: str, place: str, tmp_path: Path) -> None:
    model = nmcompile.compile(Cached(kind).eval(), "weights", args=(X,)).eval()
    report = nmcompile.export(model, tmp_path / "m.onnx", (X,))
    assert report.onnx.notes == (f"outputs that are not tensors are left out of the file: {place}",)
    found, expected = OnnxRuntimeModel(tmp_path / "m.onnx")(X[:3]), model(X[:3])
    wanted = [expected.logits, *expected.hidden] if kind == "dataclass" else [expected["a"]]
    assert names_in(tmp_path / "m.onnx")[1] == (["a"] if kind == "dict" else ["logits", "hidden.0"])
    torch.testing.assert_close(
        [found] if kind == "dict" else list(found), [x.detach() for x in wanted], rtol=1e-4, atol=1e-5
    )


def test_a_model_without_a_tensor_among_its_outputs_is_refused(tmp_path: Path) -> None:
    model = nmcompile.compile(Cached("nothing").eval(), "weights").eval()
    with pytest.raises(ExportError, match="Cached returns no tensor, and a file's outputs are tensors"):
        nmcompile.export(model, tmp_path / "m.onnx", (X,))


def names_in(path: Path) -> tuple[list[str], list[str]]:
    graph = onnx.load(path).graph
    return [value.name for value in graph.input], [value.name for value in graph.output]


@torch.no_grad()
def test_llama_with_a_cache_and_left_padding_at_any_length(tmp_path: Path) -> None:
    """The cache is a part of the result, and inputs and outputs have the names that Optimum gives them."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    llama: Any = nmcompile.compile(transformers.LlamaForCausalLM(config).eval(), "weights").eval()
    inputs = {"input_ids": torch.randint(64, (2, 6)), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])}
    sizes = {0: Dim("batch"), 1: Dim("length")}
    report = nmcompile.export(
        llama, tmp_path / "m.onnx", (), kwargs=inputs, dynamic_shapes=dict.fromkeys(inputs, sizes)
    )
    assert report.onnx.notes == ()
    assert report.verification is not None
    assert report.verification.notes == ("compared at batch 2, length 6 and at batch 3, length 7",)
    cache = [f"present.{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert names_in(tmp_path / "m.onnx") == (["input_ids", "attention_mask"], ["logits", *cache])
    ids, mask = torch.randint(64, (3, 9)), torch.tensor([[0] * 5 + [1] * 4, [1] * 9, [0] + [1] * 8])
    found = OnnxRuntimeModel(tmp_path / "m.onnx")(ids, mask)
    expected = llama(input_ids=ids, attention_mask=mask)
    kept = [part for layer in expected.past_key_values.layers for part in (layer.keys, layer.values)]
    torch.testing.assert_close(list(found), [expected.logits, *kept], rtol=1e-4, atol=1e-5)


def test_t5_with_its_caches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    t5: Any = nmcompile.compile(transformers.T5ForConditionalGeneration(config).eval(), "weights").eval()
    inputs = {"input_ids": torch.randint(64, (2, 6)), "decoder_input_ids": torch.randint(64, (2, 5))}
    nmcompile.export(t5, tmp_path / "m.onnx", (), kwargs=inputs)
    cache = [f"present.0.{half}.{part}" for half in ("decoder", "encoder") for part in ("key", "value")]
    assert names_in(tmp_path / "m.onnx")[1] == ["logits", *cache, "encoder_last_hidden_state"]
    other = torch.randint(64, (3, 6)), torch.randint(64, (3, 5))
    expected = t5(input_ids=other[0], decoder_input_ids=other[1])
    found = OnnxRuntimeModel(tmp_path / "m.onnx")(*other)
    crossed = expected.past_key_values.cross_attention_cache.layers[0]
    wanted = [expected.logits, crossed.keys, crossed.values, expected.encoder_last_hidden_state]
    got = [found[0], *found[3:]]
    torch.testing.assert_close(got, [one.detach() for one in wanted], rtol=1e-4, atol=1e-5)


def test_a_nodes_properties_name_its_layer_and_pattern(tmp_path: Path) -> None:
    """Netron shows them beside the node."""
    model = nmcompile.compile(Cached("dict").eval(), "weights", args=(X,)).eval()
    nmcompile.export(model, tmp_path / "m.onnx", (X,))
    properties = [
        {one.key: one.value for one in node.metadata_props} for node in onnx.load(tmp_path / "m.onnx").graph.node
    ]
    shown = {one["nmcompile.layer"]: one["nmcompile.pattern"] for one in properties if one}
    assert shown == {"a": "dense", "b": "2:4", "c": "dense"}
