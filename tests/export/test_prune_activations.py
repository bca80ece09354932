import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from nmcompile.export.write.local_functions import DOMAIN
from nmcompile.export.write.prune_activations import prune_activation
from nmcompile.export.write.trace_model import OPSET
from nmcompile.pruning import NMPattern, greedy_by_value
from tests.optimized_graphs import integer_model


def model_of(op_type: str, shape: tuple[int, ...], pattern: str, dtype: ir.DataType) -> onnx.ModelProto:
    """Make a model that only prunes, written before a node that is then removed."""
    x = ir.Value(name="x", shape=ir.Shape(["batch", *shape[1:]]), type=ir.TensorType(dtype))
    node = ir.Node("", op_type, [x])
    layout = "Channels" if op_type == "Conv" else "Features"
    graph = ir.Graph([x], [], nodes=[node], opset_imports={"": OPSET}, name="pruning")
    model = ir.Model(graph, ir_version=10)
    pruned = prune_activation(model, node, x, NMPattern.parse(pattern), layout, "pruned")
    graph.remove(node, safe=True)
    graph.outputs.append(pruned)
    return ir.to_proto(model)


@pytest.mark.parametrize("pattern", ["4:8", "2:4", "1:4"])
@pytest.mark.parametrize(
    ("op_type", "shape", "dim"),
    [("Conv", (2, 16, 3, 5), 1), ("Conv", (2, 8, 7), 1), ("MatMul", (2, 5, 16), -1), ("Gemm", (3, 16), -1)],
)
def test_function_prunes_as_the_operator_does(op_type: str, shape: tuple[int, ...], dim: int, pattern: str) -> None:
    """Small integers: almost every block has ties, which go to the lowest index."""
    x = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(0)).float()
    proto = model_of(op_type, shape, pattern, ir.DataType.FLOAT)
    onnx.checker.check_model(proto, full_check=True)
    expected = greedy_by_value(x, pattern, dim=dim)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for run in (session.run, ReferenceEvaluator(proto).run):
        [result] = run(None, {"x": x.numpy()})
        assert torch.equal(torch.tensor(result), expected)


@pytest.mark.parametrize("high", [15, 255])
@pytest.mark.parametrize("pattern", ["4:8", "2:4", "1:4", "2:6", "1:2", "7:8"])
@pytest.mark.parametrize("shape", [(2, 24, 3, 5), (2, 24, 7), (1, 24, 2, 3, 2)])
def test_integers_are_pruned_as_the_operator_does(shape: tuple[int, ...], pattern: str, high: int) -> None:
    """Along channels and along features; most blocks have ties, and some have them between the largest integers."""
    generator = torch.Generator().manual_seed(0)
    q = high - torch.randint(0, 6, shape, generator=generator) * torch.randint(0, 4, shape, generator=generator)
    for layout, dim in (("Channels", 1), ("Features", -1)):
        x = q.clamp(0, high).movedim(1, dim).contiguous().to(torch.uint8)
        proto = integer_model(x, high, pattern, layout)
        onnx.checker.check_model(proto, full_check=True)
        expected = greedy_by_value(x.float(), pattern, dim=dim).to(torch.uint8)
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        for run in (session.run, ReferenceEvaluator(proto).run):
            [result] = run(None, {"x": x.numpy()})
            assert torch.equal(torch.tensor(result), expected)


def test_every_order_within_a_block() -> None:
    """All blocks of three different integers: every order, with every kind of tie."""
    blocks = torch.cartesian_prod(*[torch.arange(3)] * 8).to(torch.uint8)
    proto = integer_model(blocks, 15, "4:8", "Features")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    [result] = session.run(None, {"x": blocks.numpy()})
    assert torch.equal(torch.tensor(result), greedy_by_value(blocks.float(), "4:8").to(torch.uint8))


def test_signs_and_halves() -> None:
    x: Tensor = torch.randn(3, 16, 4, generator=torch.Generator().manual_seed(0)).half()
    proto = model_of("Conv", (3, 16, 4), "4:8", ir.DataType.FLOAT16)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    [result] = session.run(None, {"x": x.numpy()})
    assert torch.equal(torch.tensor(result), greedy_by_value(x, "4:8", dim=1))


def test_functions_are_made_of_standard_operators() -> None:
    """Functions call standard operators and one another, nothing else."""
    x = torch.zeros(2, 16, 3, dtype=torch.uint8)
    models = [model_of(op_type, (2, 16, 16), "4:8", ir.DataType.FLOAT) for op_type in ("Conv", "MatMul")]
    for model in (*models, integer_model(x, 15, "4:8", "Channels")):
        assert {function.domain for function in model.functions} == {DOMAIN}
        named = {(DOMAIN, function.name) for function in model.functions}
        nodes = [node for function in model.functions for node in function.node]
        assert all(node.domain == "" or (node.domain, node.op_type) in named for node in nodes)
