"""Models in their own process: the same results, and errors if ONNX Runtime dies or takes too much."""

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import ModelProto, TensorProto, helper
from torch import Tensor

from nmcompile.backends.onnxruntime import Limits, OnnxRuntimeModel, isolation, model, worker
from nmcompile.backends.onnxruntime.values import Value
from nmcompile.errors import ConfigError, FileError, LoweringError, OperandError
from tests.fatal_models import FATAL, built

DTYPES = ["BOOL", "INT8", "UINT8", "INT32", "INT64", "FLOAT16", "BFLOAT16", "FLOAT", "DOUBLE"]


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the rules that would refuse the file."""
    monkeypatch.setattr(model, "check_runnable", lambda _: None)


@pytest.fixture
def tiled() -> Iterator[OnnxRuntimeModel]:
    """Make y = tile(x, times), whose inputs decide how much memory it takes."""
    text = "g (float[A,B] x, int64[2] times) => (float[C,D] y) { y = Tile(x, times) }"
    with OnnxRuntimeModel(built(text), isolated=Limits(memory=2**30)) as opened:
        yield opened


def process_of(opened: OnnxRuntimeModel) -> Any:
    session = opened._session
    assert isinstance(session, isolation.IsolatedSession)
    return session._process


def test_tensors_of_every_dtype_and_shape_go_there_and_back() -> None:
    values = [(f"x{i}", f"y{i}", getattr(TensorProto, dtype)) for i, dtype in enumerate(DTYPES)]
    nodes = [helper.make_node("Identity", [x], [y]) for x, y, _ in values]
    inputs = [helper.make_tensor_value_info(x, kind, ["n", 3]) for x, _, kind in values]
    outputs = [helper.make_tensor_value_info(y, kind, ["n", 3]) for _, y, kind in values]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 17)]
    )
    proto.ir_version = 8
    here = OnnxRuntimeModel(proto.SerializeToString(), threads=1)
    with OnnxRuntimeModel(proto.SerializeToString(), threads=1, isolated=True) as there:
        assert (there.inputs, there.outputs, there.device) == (here.inputs, here.outputs, here.device)
        for rows in (2, 0):
            tensors = [torch.randint(0, 2, (rows, 3)).to(value.dtype) for value in there.inputs]
            results = there(*[x.T.contiguous().T for x in tensors])
            assert [y.dtype for y in results] == [x.dtype for x in tensors]
            assert all(y.shape == x.shape and y.equal(x) for x, y in zip(tensors, results, strict=True))
            if rows:
                results[7].add_(1)  # it has its own memory


def test_a_model_computes_what_it_computes_here(conv_model: Callable[..., ModelProto], tmp_path: Path) -> None:
    proto = conv_model("INT8")
    tensor = proto.graph.initializer[0]
    (tmp_path / "weights").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights")
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    x = torch.randn(3, 8, 4, 4, requires_grad=True)
    expected = OnnxRuntimeModel(tmp_path / "m.onnx", threads=1)(x)
    with OnnxRuntimeModel(tmp_path / "m.onnx", threads=1, isolated=True) as there:
        result = there(x=x)
        assert isinstance(result, Tensor) and isinstance(expected, Tensor)
        assert result.equal(expected) and not result.requires_grad
        with pytest.raises(OperandError, match=r"got torch.float32 \(1, 7, 4, 4\)"):
            there(torch.ones(1, 7, 4, 4))


@pytest.mark.usefixtures("unchecked")
def test_a_crash_while_it_opens_is_an_error() -> None:
    with pytest.raises(FileError, match="ONNX Runtime could not open it: its process died of SIGFPE"):
        OnnxRuntimeModel(built(FATAL["integers by -1"][0]), isolated=True)


@pytest.mark.usefixtures("unchecked")
def test_a_crash_in_a_call_is_an_error_and_ends_the_model() -> None:
    with OnnxRuntimeModel(built(FATAL["Sum of nothing"][0]), isolated=True) as opened:
        with pytest.raises(LoweringError, match="ONNX Runtime could not run it: its process died of SIGSEGV"):
            opened(torch.ones(1, 4))
        with pytest.raises(LoweringError, match="its process has died; open it again"):
            opened(torch.ones(1, 4))


@pytest.mark.usefixtures("unchecked")
def test_what_never_ends_is_ended() -> None:
    with pytest.raises((FileError, LoweringError), match="it did not end within 3 seconds"):
        OnnxRuntimeModel(built(FATAL["Loop of 2 to the 62"][0]), isolated=Limits(seconds=3))(torch.ones(1, 4))


def test_too_much_memory_is_an_error_and_the_next_call_works(tiled: OnnxRuntimeModel) -> None:
    with pytest.raises(LoweringError, match="ONNX Runtime could not run it"):
        tiled(torch.ones(1, 1), torch.tensor([2**16, 2**14]))
    result = tiled(torch.ones(1, 1), torch.tensor([2, 3]))
    assert isinstance(result, Tensor) and result.equal(torch.ones(2, 3))


def test_a_model_that_is_refused_there_is_an_error() -> None:
    proto = helper.make_model(
        helper.make_graph(
            [helper.make_node("Frobnicate", ["x"], ["y"], domain="unknown")],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
        ),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("unknown", 1)],
        ir_version=8,
    )
    with pytest.raises(FileError, match="Frobnicate"):
        OnnxRuntimeModel(proto.SerializeToString(), isolated=True)


def test_threads_take_turns(tiled: OnnxRuntimeModel) -> None:
    wrong: list[object] = []

    def run(number: int) -> None:
        for _ in range(20):
            result = tiled(torch.full((1, 1), float(number)), torch.tensor([number, 2]))
            if not (isinstance(result, Tensor) and result.equal(torch.full((number, 2), float(number)))):
                wrong.append(result)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_process_ends_with_the_model(conv_model: Callable[..., ModelProto]) -> None:
    content = conv_model().SerializeToString()
    with OnnxRuntimeModel(content, isolated=True) as opened:
        process = process_of(opened)
        assert process.poll() is None
    assert process.returncode == -signal.SIGKILL
    opened.close()
    with pytest.raises(LoweringError, match="is closed"):
        opened(torch.ones(1, 8, 4, 4))
    forgotten = OnnxRuntimeModel(content, isolated=True)
    process = process_of(forgotten)
    del forgotten
    gc.collect()
    assert process.returncode == -signal.SIGKILL


def test_a_process_that_is_killed_meanwhile_is_an_error(tiled: OnnxRuntimeModel) -> None:
    os.kill(process_of(tiled).pid, signal.SIGKILL)
    with pytest.raises(LoweringError, match="its process died of SIGKILL"):
        tiled(torch.ones(1, 1), torch.tensor([1, 1]))


def test_an_interrupted_call_ends_the_process(tiled: OnnxRuntimeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise its answer would be taken for the next call's."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(worker, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tiled(torch.ones(1, 1), torch.tensor([1, 1]))
    with pytest.raises(LoweringError, match="open it again"):
        tiled(torch.ones(1, 1), torch.tensor([1, 1]))


ANSWERS = {
    "nothing": (b"", "ended with status 0"),
    "text": (b"Traceback (most recent call last):" * 9, "did not send an answer"),
    "a pickle": (b"\x80\x04\x95" + b"N" * 99, "did not send an answer"),
    "no end": (b"\x01\x00\x00\x00" + b"\xff" * 8, "did not send an answer"),
    "no parts": (b"\x00" * 4, "did not send an answer"),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_nothing_that_the_process_sends_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conv_model: Callable[..., ModelProto], answer: str
) -> None:
    content, message = ANSWERS[answer]
    script = tmp_path / "worker.py"
    script.write_text(
        f"import sys, time\nsys.stdin.buffer.read(4)\nsys.stdout.buffer.write({content!r})\nsys.stdout.flush()\n"
        f"time.sleep({60 if content else 0})\n"
    )
    monkeypatch.setattr(worker, "__file__", str(script))
    with pytest.raises(FileError, match=message):
        OnnxRuntimeModel(conv_model().SerializeToString(), isolated=True)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (worker.pack_type(TensorProto.FLOAT, [2, 2]), bytes(15)),
        (worker.pack_type(TensorProto.FLOAT, [2**60, 2**60]), bytes(16)),
        (worker.pack_type(TensorProto.DOUBLE, [1, 2]), bytes(16)),
        (worker.pack_type(TensorProto.FLOAT, [1] * 65), bytes(4)),
        (b"\x01\x02" + bytes(8), bytes(0)),
        (b"", bytes(0)),
    ],
    ids=["too short", "too long", "another type", "too many dims", "fewer dims", "nothing"],
)
def test_an_answer_that_is_no_output_is_refused(kind: bytes, content: bytes) -> None:
    value = Value("y", torch.float32, TensorProto.FLOAT, (None, None))
    with pytest.raises(worker.Malformed):
        isolation._tensor(value, kind, bytearray(content))


@pytest.mark.parametrize("parts", [[], [worker.pack_type(TensorProto.FLOAT, [1, 1]), bytes(5)]])
def test_an_answer_without_the_outputs_ends_the_process(
    tiled: OnnxRuntimeModel, monkeypatch: pytest.MonkeyPatch, parts: list[bytes]
) -> None:
    monkeypatch.setattr(worker, "receive", lambda *_: [worker.OK, *parts])
    with pytest.raises(LoweringError, match="did not return its outputs"):
        tiled(torch.ones(1, 1), torch.tensor([1, 1]))
    assert process_of(tiled).returncode is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"isolated": "yes"}, "isolated is 'yes'"),
        ({"isolated": True, "providers": ["CUDAExecutionProvider"]}, "runs on the CPU, not with CUDAExecutionProvider"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OnnxRuntimeModel(b"", **options)


@pytest.mark.parametrize("limits", [{"seconds": 0}, {"seconds": float("nan")}, {"memory": 0}, {"memory": 1.5}])
def test_limits_that_are_none_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(limits))):
        Limits(**limits)


def test_a_model_in_this_process_can_be_closed(conv_model: Callable[..., ModelProto]) -> None:
    with OnnxRuntimeModel(conv_model().SerializeToString(), threads=1) as opened:
        opened(torch.ones(1, 8, 4, 4))
    with pytest.raises(LoweringError, match="is closed"):
        opened(torch.ones(1, 8, 4, 4))
