"""Bad input raises an error of the project's own tree that says where the problem is and what to do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig, LayerConfig, NMPattern, Pruning, errors, pruning
from nmcompile.backends.reference import ReferenceBackend
from nmcompile.ir.protocols import Support

X = torch.zeros(2, 12)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(12, 8)
        self.decoder = nn.Linear(8, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.decoder(self.encoder(x).relu()).relu())
        return scores


def weight(pattern: str, operator: str = "greedy") -> LayerConfig:
    return LayerConfig(weight=Pruning(operator, NMPattern.parse(pattern)))


def compiled(**options: Any) -> nn.Module:
    return nmcompile.compile(Net(), **options)


def analyzed(**options: Any) -> Any:
    return nmcompile.analyze(Net(), **options)


def layers(**overrides: LayerConfig | None) -> nn.Module:
    return compiled(config=CompileConfig(layers=overrides))


def quantized_like() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))
    return model


BAD: dict[str, tuple[Callable[[], Any], type[errors.NMCompileError], tuple[str, ...]]] = {
    "mode": (lambda: compiled(mode="trainin"), errors.ConfigError, ("'trainin'", "did you mean 'training'")),
    "mode of analyze": (lambda: nmcompile.analyze(Net(), "weight"), errors.ConfigError, ("did you mean 'weights'",)),
    "backend": (lambda: compiled(backend="referense"), errors.ConfigError, ("did you mean 'reference'",)),
    "no mode": (lambda: compiled(mode=None), errors.ConfigError, ("mode is None", "one of dense, weights")),
    "no backend": (lambda: compiled(backend=None), errors.ConfigError, ("backend is None", "auto, reference")),
    "dict for a config": (lambda: compiled(config={}), errors.ConfigError, ("config is of type dict", "CompileConfig")),
    "tensor for args": (lambda: compiled(args=X), errors.ConfigError, ("args is of type Tensor", "args=(x,)")),
    "list for args": (lambda: compiled(args=[X]), errors.ConfigError, ("args is of type list", "args=(x,)")),
    "args of analyze": (lambda: analyzed(args=X), errors.ConfigError, ("args is of type Tensor", "args=(x,)")),
    "config of analyze": (lambda: analyzed(config={}), errors.ConfigError, ("of type dict", "a CompileConfig")),
    "tensor for kwargs": (lambda: compiled(kwargs=X), errors.ConfigError, ("kwargs is of type Tensor", "a dict")),
    "target of verify": (lambda: nmcompile.verify({}), errors.ConfigError, ("of type dict", "a model, or the path")),  # type: ignore[arg-type]
    "pattern text": (lambda: NMPattern.parse("2/4"), errors.ConfigError, ("'2/4'", "'N:M'", "'2:4'")),
    "pattern of nothing": (lambda: NMPattern.parse("4:4"), errors.ConfigError, ("4:4", "N < M")),
    "layer": (lambda: layers(encodr=None), errors.ConfigError, ("'encodr'", "did you mean 'encoder'")),
    "layer that does not fit": (
        lambda: layers(decoder=weight("2:5")),
        errors.PreconditionError,
        ("'decoder'", "(10, 8)", "8 in-features are not a multiple of 5", "another pattern or None"),
    ),
    "nothing to compile": (
        lambda: nmcompile.compile(nn.Sequential(nn.ReLU(), nn.Bilinear(4, 4, 4))),
        errors.CaptureError,
        ("Sequential", "no conv or linear", "1: bilinear layer"),
    ),
    "lazy layer": (
        lambda: nmcompile.compile(nn.LazyLinear(4)),
        errors.CaptureError,
        ("run the model once",),
    ),
    "complex weights": (
        lambda: nmcompile.compile(quantized_like()),
        errors.CaptureError,
        ("0: its weight is complex64",),
    ),
    "no model": (lambda: nmcompile.compile(torch.relu), errors.CaptureError, ("an nn.Module",)),  # type: ignore[arg-type]
    "arguments": (
        lambda: compiled(args=(torch.zeros(2, 13),)),
        errors.CaptureError,
        ("Net", "float32[2, 13]", "pass args="),
    ),
    "integer tensor": (
        lambda: pruning.greedy(torch.arange(8), "2:4"),
        errors.OperandError,
        ("int64", "float32"),
    ),
    "complex tensor": (
        lambda: pruning.mvue(torch.zeros(8, dtype=torch.complex64), "2:4"),
        errors.OperandError,
        ("complex64", "float32"),
    ),
    "inspect of a plain model": (lambda: nmcompile.inspect(Net()), errors.StateError, ("Net", "nmcompile.analyze")),
    "state of a plain model": (lambda: nmcompile.sparse_state_dict(Net()), errors.StateError, ("nmcompile.compile",)),
    "verify of a plain model": (lambda: nmcompile.verify(Net()), errors.ConfigError, ("give the pattern",)),
    "layer of a report": (
        lambda: nmcompile.analyze(Net()).layer("hed"),
        errors.ConfigError,
        ("'hed'", "did you mean 'head'"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    act, kind, fragments = BAD[case]
    with pytest.raises(errors.NMCompileError) as caught:
        act()
    assert type(caught.value) is kind
    assert [text for text in fragments if text not in str(caught.value)] == []


def test_backend_that_cannot_run_here_says_why() -> None:
    class Unusable(ReferenceBackend):
        def available(self) -> Support:
            return Support(False, "no such chip")

    with pytest.raises(errors.BackendUnavailable, match=r"'reference'.*no such chip.*backend='auto'"):
        compiled(backend=Unusable())


def test_gradient_penalty_is_refused_by_name_and_works_on_the_decompiled_model() -> None:
    torch.manual_seed(0)
    sparse, x = compiled(), torch.randn(4, 12, requires_grad=True)
    with pytest.raises(errors.GradientError, match=r"'decoder'.*create_graph=True.*nmcompile\.decompile"):
        torch.autograd.grad(sparse(x).sum(), x, create_graph=True)
    plain = nmcompile.decompile(sparse)
    (gradient,) = torch.autograd.grad(plain(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert all(p.grad is not None for name, p in plain.named_parameters() if name.endswith("weight"))


def test_gradient_penalty_works_on_layers_that_are_left_out_as_the_error_says() -> None:
    everything = CompileConfig(ends="sparse")
    sparse = nmcompile.compile(nn.Sequential(nn.Linear(8, 8)), "weights", config=everything)
    x = torch.randn(4, 8, requires_grad=True)
    with pytest.raises(errors.GradientError, match=r"leave the layer out with CompileConfig\(layers={'0': None}\)"):
        torch.autograd.grad(sparse(x).sum(), x, create_graph=True)
    left = nmcompile.compile(sparse, "weights", config=CompileConfig(ends="sparse", layers={"0": None}))
    (gradient,) = torch.autograd.grad(left(x).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert x.grad is not None


def test_integer_input_is_refused_as_eager_refuses_it() -> None:
    x = torch.zeros(2, 12, dtype=torch.int64)
    with pytest.raises(RuntimeError):
        Net()(x)
    with pytest.raises(RuntimeError):
        compiled(config=CompileConfig(ends="sparse"))(x)


def test_one_weight_cannot_have_two_masks() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    config = CompileConfig(layers={"0": weight("2:4"), "2": weight("1:4")})
    with pytest.raises(errors.ConfigError, match=r"'0' and '2' share one weight.*2:4.*1:4.*give both the same"):
        nmcompile.compile(model, config=config)


def test_every_error_is_of_the_tree() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) > 5
    assert all(issubclass(kind, nmcompile.NMCompileError) and kind.__doc__ for kind in kinds)


@pytest.mark.parametrize(
    ("known", "expected"),
    [(("gemm", "prune"), "'prune'"), (("x", "y"), "known names: x, y"), ((), "there are none")],
)
def test_nearest_names_one_or_lists_all(known: tuple[str, ...], expected: str) -> None:
    assert expected in errors.nearest("prun", known)


def test_nearest_does_not_list_hundreds() -> None:
    assert len(errors.nearest("?", (f"layer{index}" for index in range(1000)))) < 200
