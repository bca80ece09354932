"""Forwards that are set on modules: the class's own, Accelerate's hooks, and other code."""

import copy
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_submodules
from accelerate.utils import convert_outputs_to_fp32, extract_model_from_parallel
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.capture import capture_model
from nmcompile.errors import CaptureError, PassError

SPARSE = CompileConfig(ends="sparse")


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 8), nn.ReLU(), Functional(), nn.Unflatten(1, (8, 1)), nn.Conv1d(8, 8, 1), nn.Flatten(),
        nn.BatchNorm1d(8), nn.Linear(8, 8),
    )  # fmt: skip


LAYERS = ["0", "2.weight", "4", "7"]


def bind(model: nn.Module) -> None:
    """Set each module's forward to the one it has already."""
    for module in model.modules():
        module.forward = types.MethodType(type(module).forward, module)


class Doubled(ModelHook):  # type: ignore[misc]
    """A hook whose effect shows: it doubles what a module returns, in training too."""

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return output * 2


def hook(model: nn.Module) -> None:
    for module in (model[0], model[2], model[7]):  # type: ignore[index]
        add_hook_to_module(module, Doubled())
    add_hook_to_module(model[4], SequentialHook(Doubled(), Doubled()))  # type: ignore[index]


def dispatch(model: nn.Module) -> None:
    dispatch_model(model, {"": "cpu"}, force_hooks=True)


SETTERS = [bind, hook, dispatch]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 8)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("setter", SETTERS)
def test_layers_whose_own_forward_is_set_are_compiled(
    setter: Callable[[nn.Module], None], when: str, x: Tensor
) -> None:
    model, plain = network(), network()
    plain.load_state_dict(model.state_dict())
    masked = nmcompile.finalize(nmcompile.compile(plain, "training", config=SPARSE))
    setter(masked)
    if when == "before":
        setter(model)
    compiled = nmcompile.compile(model, "training", config=SPARSE)
    if when == "after":
        setter(compiled)
    y = compiled(x)
    assert {layer.name: layer.status for layer in nmcompile.inspect(compiled).layers} == dict.fromkeys(LAYERS, "sparse")
    torch.testing.assert_close(y, masked(x))
    for other in (
        copy.deepcopy(compiled),
        nmcompile.finalize(compiled),
        nmcompile.compile(compiled, "training", config=SPARSE),
    ):
        torch.testing.assert_close(other(x), y)
    if when == "after":
        setter(model)
    torch.testing.assert_close(nmcompile.decompile(copy.deepcopy(compiled))(x), model(x))
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in compiled.parameters())


def test_hooks_can_be_removed_from_a_compiled_model(x: Tensor) -> None:
    model = network().eval()
    expected = nmcompile.compile(model, "weights", config=SPARSE)(x)
    hook(model)
    compiled = nmcompile.compile(model, "weights", config=SPARSE)
    remove_hook_from_submodules(compiled)
    torch.testing.assert_close(compiled(x), expected)
    assert nmcompile.inspect(compiled).layer("0").status == "sparse"
    remove_hook_from_submodules(model)
    torch.testing.assert_close(nmcompile.decompile(compiled)(x), model(x))


def test_integers_and_absorbed_norms_run_under_hooks(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8)).eval()
    plain = nmcompile.compile(model, "inference", args=(x,), config=SPARSE, calibration=[(x,)])
    for module in model:
        add_hook_to_module(module, ModelHook())
    hooked = nmcompile.compile(model, "inference", args=(x,), config=SPARSE, calibration=[(x,)])
    assert nmcompile.inspect(hooked).layer("0").plan.norm == "1"
    torch.testing.assert_close(hooked(x), plain(x))


def test_a_forward_that_is_wrapped_after_compile_has_to_be_unwrapped_first(x: Tensor) -> None:
    compiled = nmcompile.compile(Functional(), "weights", config=SPARSE)
    y = compiled(x)
    # Done as in Accelerator.prepare; an Accelerator itself would set the precision of the whole process.
    compiled._original_forward = compiled.forward  # type: ignore[assignment]
    in_bfloat16 = torch.autocast("cpu", torch.bfloat16)(compiled.forward.__func__)  # type: ignore[attr-defined]
    compiled.forward = types.MethodType(convert_outputs_to_fp32(in_bfloat16), compiled)
    assert compiled(x).dtype == torch.float32
    for undo in (nmcompile.finalize, nmcompile.decompile):
        with pytest.raises(PassError, match="keep_fp32_wrapper=False"):
            undo(compiled)
    plain = nmcompile.finalize(extract_model_from_parallel(compiled, keep_fp32_wrapper=False))
    torch.testing.assert_close(plain(x), y, rtol=0, atol=0)


def foreign(self: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, self.weight * 2)


def patch(model: nn.Module, *names: str) -> None:
    for name in names:
        module = model.get_submodule(name)
        module.forward = types.MethodType(foreign, module)


def test_layers_with_another_forward_are_listed_and_counted(x: Tensor) -> None:
    model = network()
    patch(model, "0", "2")
    captured = capture_model(model)
    assert [site.layer.name for site in captured.sites] == ["4", "7"]
    for name in ("0", "2"):
        assert captured.python[name].startswith("its forward is set on the instance (foreign)")
        assert captured.uncaptured[name] == (f"{name}.weight",)
    report = nmcompile.analyze(model, config=SPARSE)
    assert report.summary["parameters"] == 4 * 64
    assert report.summary["uncaptured_parameters"] == report.summary["sparse_parameters"] == 2 * 64
    assert "stays Python: 0: its forward is set on the instance (foreign)" in report.full()
    compiled = nmcompile.compile(model, "dense")
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)


def test_a_model_of_nothing_but_other_forwards_names_them_and_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    patch(model, "0", "2")
    with pytest.raises(CaptureError, match=r"that can be compiled \(0: .*`del module.forward` before.*; 2: "):
        nmcompile.compile(model)


def test_offloaded_weights_are_listed() -> None:
    model = cpu_offload(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), "cpu")
    with pytest.raises(CaptureError, match=r"0: its weights are offloaded by accelerate; compile before"):
        nmcompile.compile(model)


def test_what_other_code_stands_for_is_not_known() -> None:
    """A ReLU or batch norm with a forward of other code is not taken for one."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    assert capture_model(model).facts["3"].nonnegative and capture_model(model).facts["0"].norm == "1"
    for name in ("1", "2"):
        module = model.get_submodule(name)
        module.forward = types.MethodType(lambda self, x: -x, module)
    facts = capture_model(model).facts
    assert not facts["3"].nonnegative and not facts["0"].norm and not facts["0"].rectified


@pytest.mark.parametrize("method", ["in_proj", "forward"])
def test_attention_whose_forward_is_set(method: str, x: Tensor) -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    if method == "forward":
        attention = block.get_submodule("self_attn")
        attention.forward = types.MethodType(lambda self, q, *args, **kwargs: (q, None), attention)
        captured = capture_model(block)
        assert "self_attn" in captured.python and captured.uncaptured["self_attn"] == ("self_attn.in_proj_weight",)
        assert not any(site.role == "in_proj" for site in captured.sites)
    else:
        config = nmcompile.CompileConfig(ends="sparse")
        y = nmcompile.compile(block, "weights", config=config)(x[None])
        bind(block)
        compiled = nmcompile.compile(block, "weights", config=config)
        torch.testing.assert_close(compiled(x[None]), y)
        assert nmcompile.inspect(compiled).layer("self_attn.in_proj").status == "sparse"
