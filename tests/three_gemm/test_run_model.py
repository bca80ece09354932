"""Batches as loaders yield them, and how a model is called with them."""

from collections import UserDict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader

import nmcompile
from nmcompile.errors import CalibrationError
from nmcompile.three_gemm.run_model import run_batch

A, B, C = torch.randn(2, 8), torch.randn(2, 8), torch.randn(2, 8)
Pair = namedtuple("Pair", "image label")


class One(nn.Module):
    def forward(self, x: Any) -> Any:
        return {"x": x}


class Optional(nn.Module):
    def forward(self, x: Any, mask: Any = None, *, scale: Any = None) -> Any:
        return {"x": x, "mask": mask, "scale": scale}


class Two(nn.Module):
    def forward(self, a: Any, b: Any) -> Any:
        return {"a": a, "b": b}


class Labelled(nn.Module):
    """A model as in transformers: everything is optional, labels are an argument, and the rest is passed on."""

    def forward(self, ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        return {"ids": ids, "labels": labels, **kwargs}


class Images(nn.Module):
    """A model that takes images like torchvision's detectors."""

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        return {"images": images, "targets": targets}


class Wrapper(nn.Module):
    """A wrapper like DistributedDataParallel."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


PACKED = pack_padded_sequence(torch.randn(2, 3, 4), torch.tensor([3, 2]), batch_first=True)
TARGETS = [{"boxes": C}, {"boxes": C}]
UNDERSTOOD: dict[str, tuple[nn.Module, Any, dict[str, Any]]] = {
    "tensor": (One(), A, {"x": A}),
    "input and label": (One(), (A, C), {"x": A}),
    "list of input and label": (One(), [A, C], {"x": A}),
    "nested input": (One(), [[A], C], {"x": A}),
    "named tuple": (One(), Pair(A, C), {"x": A}),
    "packed sequence": (One(), PACKED, {"x": PACKED}),
    "packed sequence and label": (One(), (PACKED, C), {"x": PACKED}),
    "names": (One(), {"x": A, "label": C, "file": ["a", "b"]}, {"x": A}),
    "names in a class of its own": (One(), UserDict(x=A, label=C), {"x": A}),
    "names and label": (One(), [{"x": A}, C], {"x": A}),
    "a mapping is the argument": (One(), {"image": A}, {"x": {"image": A}}),
    "a tuple is the argument": (One(), ((A, B), C), {"x": (A, B)}),
    "optional arguments stay out": (Optional(), (A, C), {"x": A, "mask": None, "scale": None}),
    "optional arguments nested": (Optional(), [[A, B], C], {"x": A, "mask": B, "scale": None}),
    "optional arguments by name": (Optional(), {"x": A, "scale": B, "y": C}, {"x": A, "mask": None, "scale": B}),
    "two inputs": (Two(), (A, B), {"a": A, "b": B}),
    "two inputs and a label": (Two(), (A, B, C), {"a": A, "b": B}),
    "list of two inputs and a label": (Two(), [A, B, C], {"a": A, "b": B}),
    "two nested inputs and a label": (Two(), [[A, B], C], {"a": A, "b": B}),
    "labels that forward takes": (Labelled(), {"ids": A, "labels": C}, {"ids": A, "labels": C}),
    "further names that forward takes": (Labelled(), {"ids": A, "b": B}, {"ids": A, "labels": None, "b": B}),
    "images and targets": (Images(), ([A, B], TARGETS), {"images": [A, B], "targets": None}),
    "images": (Images(), [A, B], {"images": [A, B], "targets": None}),
    "wrapped, two inputs and a label": (Wrapper(Wrapper(Two())), [A, B, C], {"a": A, "b": B}),
    "wrapped, names": (Wrapper(One()), {"x": A, "label": C}, {"x": A}),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_a_batch_is_understood_by_the_signature_of_forward(name: str) -> None:
    model, batch, expected = UNDERSTOOD[name]
    found = run_batch(model, batch)
    assert isinstance(found, dict) and found.keys() == expected.keys()
    assert all(same(found[key], expected[key]) for key in expected)


def same(x: Any, y: Any) -> bool:
    if isinstance(y, list | tuple) and not isinstance(y, type(PACKED)):
        return type(x) is type(y) and all(same(*pair) for pair in zip(x, y, strict=True))
    return x is y or (isinstance(y, dict) and x.keys() == y.keys() and all(same(x[key], y[key]) for key in y))


class Sum(nn.Module):
    """A model of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head((self.a(a) + self.b(b)).relu())


@pytest.fixture
def sums() -> nn.Module:
    torch.manual_seed(0)
    return nmcompile.compile(Sum().eval(), "inference", config=nmcompile.CompileConfig(ends="sparse"))


def clips(model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in nmcompile.sparse_state_dict(model).items() if key.endswith(".clip")}


SAMPLES = [*zip(A, B, strict=True), *zip(B, C, strict=True)]
LOADERS: dict[str, Callable[[Any, Any], Any]] = {
    "nested": lambda x, y: ((x, y), 0),
    "flat": lambda x, y: (x, y, 0),
    "by name": lambda x, y: {"a": x, "b": y, "label": 0},
}


@pytest.mark.parametrize("kind", LOADERS)
def test_calibration_takes_what_default_collate_yields(sums: nn.Module, kind: str) -> None:
    loader: DataLoader[Any] = DataLoader([LOADERS[kind](x, y) for x, y in SAMPLES], batch_size=2)  # type: ignore[arg-type]
    nmcompile.calibrate(sums, loader)
    found = clips(sums)
    nmcompile.calibrate(sums, [{"a": A, "b": B}, {"a": B, "b": C}])
    assert len(found) == 3
    assert found == clips(sums)


BAD: dict[str, tuple[Any, str]] = {
    "number": (3.5, "of type float"),
    "text": ("text", "of type str"),
    "array": (np.zeros((2, 8), np.float32), r"numpy float32\[2, 8\]"),
    "arrays": ([np.zeros((2, 8)), np.zeros((2, 8))], r"list \(numpy float64\[2, 8\], numpy float64\[2, 8\]\)"),
    "nothing": (None, "None"),
    "empty": ((), r"tuple \(\)"),
    "one of two": ((A,), r"tuple \(float32\[2, 8\]\), on which Sum.forward\(a, b\) fails: missing .*'b'"),
    "integers": ((A.long(), B.long()), r"int64\[2, 8\]"),
    "float64": ((A.double(), B.double()), r"float64\[2, 8\], float64\[2, 8\]\), on which .*dtype"),
    "other names": (UserDict(x=A, y=B), r"UserDict \{'x': float32\[2, 8\], 'y': float32\[2, 8\]\}"),
    "widths": ((A[:, :4], B), r"float32\[2, 4\]"),
    "many": ([A] * 9 + ["x"], r"float32\[2, 8\], ... 10 in all"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_batch_that_is_not_understood_is_named_with_what_it_holds(sums: nn.Module, name: str) -> None:
    batch, message = BAD[name]
    if name == "many":
        batch = ([*batch], 0)
    with pytest.raises(
        CalibrationError, match=rf"calibration batch 1 is .*{message}.*; give a tensor, a mapping"
    ) as raised:
        nmcompile.calibrate(sums, [(A, B), batch])
    assert raised.value.__cause__ is not None


@pytest.mark.parametrize("data", [A, A.numpy(), {"a": A, "b": B}, UserDict(a=A, b=B), "text", 3, None])
def test_a_batch_in_place_of_batches_is_refused(sums: nn.Module, data: Any) -> None:
    with pytest.raises(
        CalibrationError, match=r"the calibration data is .*; give an iterable of batches, such as \[batch\]"
    ):
        nmcompile.calibrate(sums, data)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_numbers_are_reported_at_their_batch(sums: nn.Module, value: float) -> None:
    seen = []

    def batches() -> Any:
        for number in range(4):
            seen.append(number)
            yield (A, B) if number != 2 else (A, B.index_fill(1, torch.tensor(3), value))

    with pytest.raises(
        CalibrationError, match=r"layer 'b': calibration batch 2, tuple \(float32\[2, 8\], .* NaN or inf"
    ):
        nmcompile.calibrate(sums, batches())
    assert seen == [0, 1, 2]


def test_comparing_says_what_is_wrong_with_a_batch(sums: nn.Module) -> None:
    nmcompile.calibrate(sums, [(A, B)])
    with pytest.raises(CalibrationError, match=r"the batch is float32\[2, 8\], on which Sum.forward\(a, b\) fails"):
        nmcompile.compare(nmcompile.decompile(sums), sums, A)


def test_a_tokenizers_batch_is_taken() -> None:
    """The batch that DataCollatorWithPadding yields."""
    from transformers import BatchEncoding, BertConfig, BertForSequenceClassification

    small: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    bert = BertForSequenceClassification(BertConfig(**small, intermediate_size=64)).eval()
    inputs = {"input_ids": torch.randint(3, 50, (4, 9)), "attention_mask": torch.ones(4, 9, dtype=torch.int64)}
    ours = nmcompile.compile(bert, "inference", calibration=[BatchEncoding(inputs | {"labels": torch.zeros(4).long()})])
    plain = nmcompile.compile(bert, "inference", calibration=[inputs | {"labels": torch.zeros(4).long()}])
    assert torch.equal(ours.eval()(**inputs).logits, plain.eval()(**inputs).logits)
