"""Files that kill ONNX Runtime are refused before it opens them, and their harmless relatives are not."""

import numpy as np
import onnxruntime
import pytest

from nmcompile.backends.onnxruntime import OnnxRuntimeModel
from nmcompile.errors import FileError
from nmcompile.files.onnx_rules import check_runnable
from nmcompile.files.open_onnx import open_onnx
from tests.fatal_models import FATAL, HARMLESS, built


@pytest.mark.parametrize("name", FATAL)
def test_what_kills_onnx_runtime_is_refused(name: str) -> None:
    text, message = FATAL[name]
    content = built(text)
    assert open_onnx(content).proto.graph.node  # valid, as far as onnx's own check goes
    with pytest.raises(FileError, match=f"the model: node .*{message}.*; ONNX Runtime would crash, or not end"):
        OnnxRuntimeModel(content)


@pytest.mark.parametrize("name", HARMLESS)
def test_what_onnx_runtime_runs_is_not(name: str) -> None:
    content = built(HARMLESS[name])
    check_runnable(open_onnx(content))
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    [x] = session.get_inputs()
    [y] = session.run(None, {"x": np.ones(x.shape, np.float32)})
    assert np.isfinite(y).all()


def test_a_large_divisor_is_read_once_for_all_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    divisions = " ".join(f"t{i + 1} = Div(t{i}, d)" for i in range(50))
    text = f"g (int32[1,4] t0) => (int32[A,B] y) <int32[1,4] d = {{1, 2, 3, 4}}> {{ {divisions} y = Identity(t50) }}"
    opened, read = open_onnx(built(text)), []

    def counted(*args: object) -> object:
        read.append(args)
        return np.array([1, 2, 3, 4], np.int32)

    monkeypatch.setattr("nmcompile.files.onnx_rules.read_tensor", counted)
    check_runnable(opened)
    assert len(read) == 1
