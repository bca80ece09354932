from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile.errors import ExportError
from nmcompile.export import Example, verify_onnx, write_onnx
from nmcompile.export.check import compare_runtimes
from nmcompile.export.check.lockstep import Lockstep
from nmcompile.export.check.run_file import onnxruntime_runner
from nmcompile.three_gemm.find_triples import triples_of

TOP = 135  # 7 steps above the zero point
Found = list[np.ndarray[Any, Any]]


@pytest.fixture
def report(net: nn.Module, images: Tensor, deploy: Callable[..., Any], tmp_path: Path) -> Any:
    model = deploy(net)
    return model, write_onnx(model.plain, model.layers, tmp_path / "m.onnx", (images,))


@pytest.fixture
def lockstep(report: Any) -> Lockstep:
    model, written = report
    return Lockstep(onnx.load(written.path), written.nodes, model.layers, model.reference, written.target)


@pytest.fixture
def found(lockstep: Lockstep, images: Tensor) -> Found:
    return onnxruntime_runner(lockstep.proto, "onnxruntime")({lockstep.proto.graph.input[0].name: images.numpy()})


def test_the_integers_of_all_quantized_layers_are_exposed(report: Any, lockstep: Lockstep, found: Found) -> None:
    model, _ = report
    assert len(found) == 1 + len(model.layers)
    assert all(x.dtype == np.uint8 for x in found[1:])


def test_runtime_that_agrees_changes_nothing(report: Any, lockstep: Lockstep, found: Found, images: Tensor) -> None:
    model, _ = report
    with torch.no_grad():
        torch.testing.assert_close(lockstep.run(Example((images,)), found), model.reference(images))
    assert lockstep.taken_over == 0


def test_torch_goes_on_from_what_was_rounded_otherwise(
    report: Any, lockstep: Lockstep, found: Found, images: Tensor
) -> None:
    model, _ = report
    with torch.no_grad():
        before = lockstep.run(Example((images,)), found)
        sign = 1 if found[-1][0, 3] < TOP else -1
        found[-1][0, 3] += np.int16(sign).astype(np.uint8)  # of the last layer, so no other one is affected
        after = lockstep.run(Example((images,)), found)
    step = sign * model.layers["head"].input.scale * model.layers["head"].weight.values[:, 3]
    assert isinstance(before, Tensor) and isinstance(after, Tensor)
    torch.testing.assert_close(after - before, torch.cat([step[None], torch.zeros(3, 8)]))
    assert lockstep.taken_over == 1
    with torch.no_grad():
        lockstep.run(Example((images,)), found)
    assert lockstep.taken_over == 2  # in all batches


def test_two_steps_are_no_rounding(lockstep: Lockstep, found: Found, images: Tensor) -> None:
    found[1].reshape(-1)[0] += np.int16(2 if found[1].reshape(-1)[0] < TOP - 1 else -2).astype(np.uint8)
    with torch.no_grad(), pytest.raises(ExportError, match="layer 'stem' reads other values in the file"):
        lockstep.run(Example((images,)), found)


def test_more_than_one_in_a_thousand_is_no_rounding(lockstep: Lockstep, found: Found, images: Tensor) -> None:
    integers = found[1].reshape(-1)
    changed = integers[: integers.size // 500]
    changed += np.where(changed < TOP, 1, -1).astype(np.uint8)
    with (
        torch.no_grad(),
        pytest.raises(ExportError, match=r"'stem' .* up to 1 quantization steps apart, 99.8\d% equal"),
    ):
        lockstep.run(Example((images,)), found)


def test_runtimes_run_in_lockstep_where_they_disagree_alone(
    report: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, written = report
    compare, calls = compare_runtimes.compare_runtime, []

    def disagreeing_at_first(name: str, *args: Any) -> Any:
        calls.append(name)
        check = compare(name, *args)
        return replace(check, relative_l2=0.5) if calls.count(name) == 1 else check

    monkeypatch.setattr(compare_runtimes, "compare_runtime", disagreeing_at_first)
    checks = verify_onnx(written, model.layers, model.reference, [Example((images,))]).runtimes
    assert calls == ["ONNX Runtime"] * 2 + ["onnx.reference"] * 2
    assert all(check.relative_l2 < 1e-5 and check.taken_over == 0 for check in checks)
    assert str(checks[0]).startswith("ONNX Runtime: in lockstep, 0 integers rounded otherwise: relative L2")


def test_the_file_itself_has_to_give_what_the_exposed_one_gives(
    report: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, written = report

    def load(proto: onnx.ModelProto, target: str) -> Any:
        run = onnxruntime_runner(proto, target)
        is_exposed = len(proto.graph.output) > 1
        return run if is_exposed else lambda feeds: [1.1 * output for output in run(feeds)]

    monkeypatch.setattr(compare_runtimes, "onnxruntime_runner", load)
    with pytest.raises(ExportError, match="ONNX Runtime: its outputs change when its integers are exposed"):
        verify_onnx(written, model.layers, model.reference, [Example((images,))])


def test_of_equal_elements_either_is_kept(
    net: nn.Module, images: Tensor, deploy: Callable[..., Any], tmp_path: Path
) -> None:
    model = deploy(net, prune_inputs=True)
    written = write_onnx(model.plain, model.layers, tmp_path / "m.onnx", (images,))
    lockstep = Lockstep(onnx.load(written.path), written.nodes, model.layers, model.reference, written.target)
    head = lockstep._inputs[-1]
    x = torch.tensor([[1.0, 1, 1, 1, 1, 0.5, 0.25, 0] * 2])

    def kept(*places: int) -> Any:
        result = torch.zeros_like(x)
        result[0, [*places, 8, 9, 10, 11]] = x[0, [*places, 8, 9, 10, 11]]
        return result.numpy()

    check, differing = head.check(x, kept(0, 1, 2, 3))
    assert check.ok and differing == 0
    check, differing = head.check(x, kept(0, 1, 2, 4))
    assert check.ok and differing == 2
    assert not head.check(x, kept(0, 1, 2, 5))[0].ok  # keeps a smaller one
    assert not head.check(x, np.roll(kept(0, 1, 2, 3), 3, axis=1))[0].ok  # has them elsewhere


@pytest.mark.parametrize("mode", ["circular", "reflect"])
def test_layers_that_pad_by_themselves(mode: Any, images: Tensor, deploy: Callable[..., Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(8, 16, 3, padding=1, padding_mode=mode)
    model = deploy(nn.Sequential(first, nn.ReLU(), nn.Conv2d(16, 8, 3)).eval())
    written = write_onnx(model.plain, model.layers, tmp_path / "m.onnx", (images,))
    lockstep = Lockstep(onnx.load(written.path), written.nodes, model.layers, model.reference, written.target)
    found = onnxruntime_runner(lockstep.proto, "onnxruntime")({lockstep.proto.graph.input[0].name: images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(lockstep.run(Example((images,)), found), model.reference(images))


@pytest.mark.parametrize("batch_first", [True, False])
def test_projections_of_attention_are_followed_too(
    batch_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)
    model, x = nn.Sequential(nn.Linear(16, 16), block, nn.Linear(16, 4)).eval(), torch.randn(2, 5, 16)
    compiled = nmcompile.compile(model, "inference", args=(x,), calibration=[x]).eval()
    compare, followed = compare_runtimes.compare_runtime, []

    def disagreeing_at_first(name: str, run: Any, inputs: Any, outputs: int, reference: Any, batches: Any) -> Any:
        check = compare(name, run, inputs, outputs, reference, batches)
        if isinstance(getattr(reference, "__self__", None), Lockstep):
            followed.append(len(reference.__self__.proto.graph.output) - outputs)
            return check
        return replace(check, relative_l2=0.5)

    monkeypatch.setattr(compare_runtimes, "compare_runtime", disagreeing_at_first)
    checks = nmcompile.export(compiled, tmp_path / "m.onnx", (x,), verify=True).verification
    assert checks is not None and all(check.relative_l2 < 1e-5 for check in checks.runtimes)
    assert followed == [4, 4]  # both projections and both linear layers, in both runtimes
    assert not any(triple.observer for triple in triples_of(compiled))
