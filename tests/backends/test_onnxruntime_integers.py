"""Native operators of ONNX Runtime on integers, 4:8 pruning and rounding, against brute force and the functions."""

import ctypes
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.backends.onnxruntime import custom_operators
from nmcompile.errors import BackendUnavailable, LoweringError
from nmcompile.export.write.build_nodes import add_initializer
from nmcompile.export.write.local_functions import add_function, call_channels_last, call_function
from nmcompile.export.write.round_integers import BODY, INPUTS, ROUND
from nmcompile.export.write.trace_model import OPSET
from nmcompile.native import INSTRUCTION_SETS, MISSING, kernels
from nmcompile.onnxruntime import OnnxRuntimeModel, register
from nmcompile.pruning import greedy_by_value
from tests.optimized_graphs import integer_model, optimized

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

Bytes = npt.NDArray[np.uint8]
CONFIG = CompileConfig(outputs="int8", ends="int8")
PLACES = np.arange(8)


def pruned(x: Bytes) -> Bytes:
    """Keep the integers of rows of eight that fewer than four are ahead of."""
    mine, others = x[:, :, None].astype(int), x[:, None, :].astype(int)
    ahead = (others > mine) | ((others == mine) & (PLACES[:, None] > PLACES))
    return np.where(ahead.sum(-1) < 4, x, 0).astype(np.uint8)


def blocks() -> Iterator[tuple[Bytes, bool]]:
    """Yield every order of three integers, then random ones, with the form of the kernel that takes them."""
    orders = np.array(list(itertools.product(range(3), repeat=8)), np.uint8)
    random = np.random.default_rng(0)
    yield orders, False
    yield orders + 253, True
    yield random.integers(0, 32, (1000, 8), np.uint8), False
    yield random.integers(0, 256, (1000, 8), np.uint8), True


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_the_kernel_keeps_the_four_largest(isa: str) -> None:
    for x, wide in blocks():
        found, expected = x.copy(), pruned(x)
        kernels.prune_bytes(found.ctypes.data, found.ctypes.data, len(x), wide, isa)
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("wide", [False, True])
def test_the_kernel_writes_its_blocks_alone(isa: str, wide: bool) -> None:
    x = np.random.default_rng(0).integers(0, 32, (200, 8), np.uint8)
    expected = pruned(x)
    for count in (0, 1, 15, 16, 31, 63, 64, 65, 130):
        out = np.full(8 * len(x) + 1, 77, np.uint8)
        kernels.prune_bytes(x[:count].ctypes.data, out.ctypes.data + 1, count, wide, isa)
        assert np.array_equal(out[1 : 8 * count + 1].reshape(-1, 8), expected[:count])
        assert (out[8 * count + 1 :] == 77).all()


def session(proto: onnx.ModelProto, native: bool, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if native:
        register(options)
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("high", [15, 255])
@pytest.mark.parametrize("layout", ["Channels", "Features"])
@pytest.mark.parametrize("shape", [(2, 24, 3, 5), (2, 24, 7), (1, 8, 2, 3, 2), (3, 16), (2, 12, 4, 1), (0, 8, 3, 3)])
def test_the_operator_equals_the_function(shape: tuple[int, ...], layout: str, high: int) -> None:
    """Also where blocks run across pixels, and for bytes above `high`, which wrap around in both."""
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    if layout == "Features":
        x = x.movedim(1, -1).contiguous()
    proto = integer_model(x, high, "4:8", layout, dynamic=True)
    [expected], [found] = ([*session(proto, native).run(None, {"x": x.numpy()})] for native in (False, True))
    assert np.array_equal(found, expected)


def test_the_operator_equals_the_torch_operator_on_every_order() -> None:
    x = torch.cartesian_prod(*[torch.arange(3)] * 8).to(torch.uint8)
    [found] = session(integer_model(x, 15, "4:8", "Features"), native=True).run(None, {"x": x.numpy()})
    assert torch.equal(torch.tensor(found), greedy_by_value(x.float(), "4:8").to(torch.uint8))


def test_threads_share_a_large_tensor() -> None:
    x = torch.randint(0, 16, (3, 40, 50, 52), dtype=torch.uint8)
    proto = integer_model(x, 15, "4:8", "Channels", dynamic=True)
    for threads in (1, 2, 3):
        [found] = session(proto, native=True, threads=threads).run(None, {"x": x.numpy()})
        assert torch.equal(torch.tensor(found), greedy_by_value(x.float(), "4:8", dim=1).to(torch.uint8))


def rounding_model(x: Tensor, numbers: dict[str, Any], channels: bool) -> onnx.ModelProto:
    """Make a model that only rounds integers like `x`, of any batch."""
    value = ir.Value(name="x", shape=ir.Shape(["batch", *x.shape[1:]]), type=ir.TensorType(ir.DataType.UINT8))
    node = ir.Node("", "Identity", [value])
    graph = ir.Graph([value], [], nodes=[node], opset_imports={"": OPSET}, name="rounding")
    model = ir.Model(graph, ir_version=10)
    inputs = {"x": value} | {name: add_initializer(model, name, np.asarray(one)) for name, one in numbers.items()}
    add_function(model, ROUND, BODY, INPUTS)
    if channels:
        graph.outputs.append(call_channels_last(model, node, (ROUND, f"{ROUND}_Channels"), inputs, "y"))
    else:
        graph.outputs.append(call_function(node, ROUND, list(inputs.values()), "y"))
    graph.remove(node, safe=True)
    return ir.to_proto(model)


def test_the_rounding_operator_equals_the_function_on_every_byte() -> None:
    """With steps that are no multiples of the scale, and with those that make ties."""
    random = np.random.default_rng(0)
    x = torch.tensor(random.permutation(256).astype(np.uint8).reshape(2, 16, 8))
    for trial in range(60):
        scale = np.float32(10 ** random.uniform(-4, 2))
        step = scale * np.float32(random.uniform(0.01, 40) if trial % 2 else 2.0 ** random.integers(-2, 6))
        zero, offset = (np.uint8(one) for one in random.choice([0, 1, 128, 255], 2))
        low, high = sorted(random.integers(0, 256, 2).astype(np.uint8))
        numbers = {"scale": scale, "zero": zero, "step": step, "offset": offset, "low": low, "high": high}
        proto = rounding_model(x, numbers, channels=trial % 4 < 2)
        [expected], [found] = ([*session(proto, native).run(None, {"x": x.numpy()})] for native in (False, True))
        assert np.array_equal(found, expected), numbers


def test_threads_share_the_rounding_of_a_large_tensor() -> None:
    x = torch.randint(0, 256, (3, 40, 50, 51), dtype=torch.uint8)
    byte = np.uint8
    numbers = {
        **{"scale": np.float32(0.1), "zero": byte(3), "step": np.float32(0.7)},
        **{"offset": byte(0), "low": byte(0), "high": byte(15)},
    }
    proto = rounding_model(x, numbers, channels=True)
    [expected] = session(proto, native=False).run(None, {"x": x.numpy()})
    for threads in (1, 2):
        assert np.array_equal(session(proto, native=True, threads=threads).run(None, {"x": x.numpy()})[0], expected)


def convolutions() -> tuple[nn.Module, Tensor]:
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 24, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(24, 16, 1), nn.Flatten(), nn.Linear(16 * 36, 4)), torch.randn(4, 3, 16, 16)


def signal() -> tuple[nn.Module, Tensor]:
    layers = [nn.Conv1d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, 16, 3), nn.ReLU(), nn.Conv1d(16, 8, 1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 30, 4)), torch.randn(4, 3, 32)


def linears() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(16, 4)), torch.randn(4, 5, 8)


@pytest.mark.parametrize(("make", "pruned_inputs"), [(convolutions, 2), (signal, 2), (linears, 2)])
def test_a_network_runs_the_operator_and_its_file_runs_without(
    make: Callable[[], tuple[nn.Module, Tensor]], pruned_inputs: int, tmp_path: Path
) -> None:
    model, x = make()
    compiled = nmcompile.compile(model.eval(), "inference", args=(x,), config=CONFIG, calibration=[x]).eval()
    path = tmp_path / "m.onnx"
    nmcompile.export(compiled, path, (x,), verify=False)
    plain, native = optimized(path), optimized(path, native=True)
    assert plain["Min"] > 0 and "PruneIntegers_4_8_Features" not in plain
    assert native["PruneIntegers_4_8_Features"] == pruned_inputs
    assert not {"Min", "Max", "Split", "GreaterOrEqual"} & set(native)
    source = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for isolated in (False, True):
        with OnnxRuntimeModel(path, threads=1, isolated=isolated) as opened:
            assert "PruneIntegers_4_8_Features" in opened.native_functions
            for batch in (1, 3):
                y = torch.randn(batch, *x.shape[1:])
                [expected] = source.run(None, {source.get_inputs()[0].name: y.numpy()})
                found = opened(y)
                assert isinstance(found, Tensor) and torch.equal(found, torch.tensor(expected))


def test_files_without_such_pruning_need_no_operator(tmp_path: Path) -> None:
    model, x = linears()
    dense = CompileConfig(layers={"_default": None})
    for target, config in (("tensorrt", CompileConfig()), ("onnxruntime", dense)):
        compiled = nmcompile.compile(model.eval(), "inference", args=(x,), config=config, calibration=[x]).eval()
        nmcompile.export(compiled, tmp_path / "m.onnx", (x,), target=target, verify=False)
        assert OnnxRuntimeModel(tmp_path / "m.onnx", threads=1).native_functions == ()


def test_standard_operators_run_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randint(0, 16, (2, 16), dtype=torch.uint8)
    content = integer_model(x, 15, "4:8", "Features").SerializeToString()
    assert OnnxRuntimeModel(content).native_functions == ("PruneIntegers_4_8_Features",)
    monkeypatch.setattr(custom_operators, "MISSING", "no compiler")
    custom_operators._is_available.cache_clear()
    try:
        model = OnnxRuntimeModel(content)
        with pytest.raises(BackendUnavailable, match=r"no compiler.*reinstall"):
            register(onnxruntime.SessionOptions())
    finally:
        custom_operators._is_available.cache_clear()
    assert model.native_functions == ()
    assert torch.equal(torch.as_tensor(model(x)), greedy_by_value(x.float(), "4:8").to(torch.uint8))


def test_a_number_of_elements_that_has_no_blocks_is_an_error() -> None:
    x = torch.randint(0, 16, (2, 16), dtype=torch.uint8)
    proto = integer_model(x, 15, "4:8", "Features", dynamic=True)
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "features"
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "features"
    model = OnnxRuntimeModel(proto.SerializeToString())
    assert model.native_functions
    with pytest.raises(LoweringError, match="not a multiple of 8"):
        model(torch.zeros(3, 5, dtype=torch.uint8))


def test_an_older_api_is_refused_with_a_status() -> None:
    """A table of functions as ONNX Runtime 1.17 and older have it: only the first, which makes a status, is called."""
    asked: list[int] = []
    made: list[tuple[int, bytes]] = []

    def create_status(code: int, message: bytes) -> int:
        made.append((code, message))
        return 4711

    def api(version: int) -> int | None:
        asked.append(version)
        return ctypes.addressof(table) if version <= 17 else None

    first = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(create_status)
    table = (ctypes.c_void_p * 1)(ctypes.cast(first, ctypes.c_void_p).value)
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(api)
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p).value, None)
    entry = ctypes.CDLL(kernels.__file__).RegisterCustomOps
    entry.restype, entry.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
    assert entry(None, ctypes.addressof(base)) == 4711
    assert asked == [18, 1] and made == [(1, b"nmcompile's operators need ONNX Runtime 1.18 or newer")]
