"""The three graphs of a layer, written out: a line per node, with its kind, its target and what it reads."""

import textwrap

import pytest
from torch import fx, nn

from nmcompile.backends.reference import ReferenceBackend
from nmcompile.capture import capture_model
from nmcompile.config import CompileConfig, Phase, preset
from nmcompile.ir.node_meta import kind_of
from nmcompile.ir.program import Program
from nmcompile.passes import compile_passes
from nmcompile.planning.plan_phases import plan_phases

FORWARD = """
    forward(input, weight, bias)
      gemm gemm_forward(input, weight)
      bias add_bias(#1, bias)
      return #2
"""
FORWARD_MASKED = """
    forward(input, weight, bias, weight_mask)
      prune apply_mask(weight, weight_mask)
      gemm gemm_forward(input, #1)
      bias add_bias(#2, bias)
      return #3
"""
BACKWARD = """
    backward(grad_output, weight)
      gemm gemm_backward(grad_output, weight)
      return #1
"""
BACKWARD_TRANSPOSABLE = """
    backward(grad_output, weight, weight_mask)
      prune apply_mask(weight, weight_mask)
      gemm gemm_backward(grad_output, #1)
      return #2
"""
BACKWARD_ROW_WISE = """
    backward(grad_output, weight, weight_mask)
      view apply_mask(weight, weight_mask)
      gemm gemm_backward(grad_output, #1)
      return #2
"""
UPDATE = """
    update(grad_output, input)
      gemm gemm_update(grad_output, input)
      bias bias_gradient(grad_output)
      return #1, #2
"""
LINEAR = {
    "dense": FORWARD + BACKWARD + UPDATE,
    "weights": FORWARD_MASKED + BACKWARD_ROW_WISE + UPDATE,
    "t-weights": FORWARD_MASKED + BACKWARD_TRANSPOSABLE + UPDATE,
    "activations": """
    forward(input, weight, bias)
      prune prune_mask(input, greedy_by_value, 4, 8, -1)
      view apply_mask(input, #1)
      gemm gemm_forward(#2, weight)
      bias add_bias(#3, bias)
      return #4, #2, #1
    backward(grad_output, weight, input_mask)
      gemm gemm_backward(grad_output, weight)
      view apply_mask(#1, input_mask)
      return #2
    update(grad_output, input_pruned)
      gemm gemm_update(grad_output, input_pruned)
      bias bias_gradient(grad_output)
      return #1, #2
    """,
    "gradients": FORWARD
    + BACKWARD
    + """
    update(grad_output, input, key)
      prune prune(grad_output, mvue, 1, 2, auto, -1, key)
      gemm gemm_update(#1, input)
      bias bias_gradient(grad_output)
      return #2, #3
    """,
    "training": FORWARD_MASKED
    + BACKWARD_TRANSPOSABLE
    + """
    update(grad_output, input, key)
      prune prune(grad_output, mvue, 2, 4, auto, -1, key)
      gemm gemm_update(#1, input)
      bias bias_gradient(grad_output)
      return #2, #3
    """,
}
CONV = {
    "training": """
    forward(input, weight, bias, weight_mask)
      prune apply_mask(weight, weight_mask)
      gemm gemm_forward(input, #1)
      bias add_bias(#2, bias)
      return #3
    backward(grad_output, weight, input, weight_mask)
      prune apply_mask(weight, weight_mask)
      gemm gemm_backward(grad_output, #1, input)
      return #2
    update(grad_output, input, weight, key)
      prune prune(grad_output, mvue, 2, 4, auto, 1, key)
      gemm gemm_update(#1, input, weight)
      bias bias_gradient(grad_output)
      return #2, #3
    """,
    "activations": """
    forward(input, weight, bias)
      prune prune_mask(input, greedy_by_value, 4, 8, 1)
      view apply_mask(input, #1)
      gemm gemm_forward(#2, weight)
      bias add_bias(#3, bias)
      return #4, #2, #1
    backward(grad_output, weight, input_mask, input_pruned)
      gemm gemm_backward(grad_output, weight, input_pruned)
      view apply_mask(#1, input_mask)
      return #2
    update(grad_output, weight, input_pruned)
      gemm gemm_update(grad_output, input_pruned, weight)
      bias bias_gradient(grad_output)
      return #1, #2
    """,
}
GROUPED_WITHOUT_BIAS = """
    forward(input, weight, weight_mask)
      prune apply_mask(weight, weight_mask)
      gemm gemm_forward(input, #1)
      return #2
    backward(grad_output, weight, input, weight_mask)
      prune apply_mask(weight, weight_mask)
      gemm gemm_backward(grad_output, #1, input)
      return #2
    update(grad_output, input, weight, key)
      prune prune(grad_output, mvue, 2, 4, auto, 1, key)
      gemm gemm_update(#1, input, weight)
      return #2
"""
LOWERED_LINEAR_TRAINING = """
    forward(input, weight, bias, weight_mask)
      prune apply_mask(weight, weight_mask)
      gemm linear_forward(input, #1, bias, False)
      return #2
    backward(grad_output, weight, weight_mask)
      prune apply_mask(weight, weight_mask)
      gemm linear_input_gradient(grad_output, #1, False)
      return #2
    update(grad_output, input, key)
      prune prune(grad_output, mvue, 2, 4, auto, -1, key)
      gemm linear_weight_gradient(#1, input, False)
      bias linear_bias_gradient(grad_output, input)
      return #2, #3
"""
LOWERED_CONV_WEIGHTS = """
    forward(input, weight, bias, weight_mask)
      prune apply_mask(weight, weight_mask)
      gemm conv_forward(input, #1, bias, [2, 2], [1, 1], [1, 1], 2)
      return #2
    backward(grad_output, weight, input, weight_mask)
      view apply_mask(weight, weight_mask)
      gemm conv_input_gradient(grad_output, #1, input, [2, 2], [1, 1], [1, 1], 2)
      return #2
    update(grad_output, input, weight)
      gemm conv_parameter_gradients(grad_output, input, weight, [2, 2], [1, 1], [1, 1], 2)
      view getitem(#1, 1)
      view getitem(#1, 0)
      return #3, #2
"""
LOWERED_CONV_TRAINING_UPDATE = """
    update(grad_output, input, weight, key)
      prune prune(grad_output, mvue, 2, 4, auto, 1, key)
      gemm conv_weight_gradient(#1, input, weight, [1, 1], [0, 0], [1, 1], 1)
      bias conv_bias_gradient(grad_output)
      return #2, #3
"""


def graphs_of(layer: nn.Module, mode: str, *, lowered: bool = False) -> str:
    """Return the text of the graphs of `layer`, which follows a ReLU."""
    captured = capture_model(nn.Sequential(nn.ReLU(), layer))
    program = Program(captured, plan_phases(captured, preset(mode), CompileConfig(ends="sparse")))
    for one in compile_passes([ReferenceBackend()]):
        if lowered or one.name != "lower-nodes":
            one.run(program)
    return "\n".join(line for phase in Phase for line in written(phase, program.layers["1"][phase].graph))


def written(phase: Phase, graph: fx.Graph) -> list[str]:
    """Return a heading with the placeholders, then the calls; `#2` is the second call of the graph."""
    names = {node: str(node.target) for node in graph.nodes if node.op == "placeholder"}
    lines = [f"{phase.value}({', '.join(names.values())})"]
    for node in graph.nodes:
        if node.op == "call_function":
            arguments = ", ".join(names[arg] if isinstance(arg, fx.Node) else str(arg) for arg in node.args)
            names[node] = f"#{len(lines)}"
            lines.append(f"  {kind_of(node)} {target_name(node)}({arguments})")
    returned: tuple[fx.Node, ...] = graph.output_node().args[0]  # type: ignore[assignment]
    return [*lines, f"  return {', '.join(names[node] for node in returned)}"]


def target_name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).removesuffix(".default")


def golden(text: str) -> str:
    return "\n".join(line for line in textwrap.dedent(text).splitlines() if line.strip())


@pytest.mark.parametrize("mode", LINEAR)
def test_linear(mode: str) -> None:
    assert graphs_of(nn.Linear(8, 8), mode) == golden(LINEAR[mode])


@pytest.mark.parametrize("mode", CONV)
def test_conv(mode: str) -> None:
    assert graphs_of(nn.Conv2d(8, 8, 3), mode) == golden(CONV[mode])


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_grouped_conv_without_bias(kind: type[nn.Conv2d]) -> None:
    assert graphs_of(kind(8, 8, 3, groups=2, bias=False), "training") == golden(GROUPED_WITHOUT_BIAS)


@pytest.mark.parametrize("mode", LINEAR)
def test_without_bias_the_graphs_are_those_with_it_less_the_bias_nodes(mode: str) -> None:
    lines = [line for line in graphs_of(nn.Linear(8, 8), mode).splitlines() if not line.startswith(("  bias", "  ret"))]
    bare = graphs_of(nn.Linear(8, 8, bias=False), mode).splitlines()
    assert [line for line in bare if not line.startswith("  ret")] == [line.replace(", bias", "") for line in lines]


def test_out_channels_that_take_no_tiles_leave_the_backward_gemm_dense_on_the_masked_weight() -> None:
    text = graphs_of(nn.Linear(8, 6), "training")
    assert golden(FORWARD_MASKED) in text and golden(BACKWARD_ROW_WISE) in text


def test_lowered_linear() -> None:
    assert graphs_of(nn.Linear(8, 8), "training", lowered=True) == golden(LOWERED_LINEAR_TRAINING)


def test_lowered_conv_takes_its_bias_gradient_from_the_update_gemm() -> None:
    conv = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
    assert graphs_of(conv, "weights", lowered=True) == golden(LOWERED_CONV_WEIGHTS)


def test_lowered_conv_takes_its_bias_gradient_from_the_gradient_that_is_not_pruned() -> None:
    text = graphs_of(nn.Conv2d(8, 8, 3), "training", lowered=True)
    assert text.endswith(golden(LOWERED_CONV_TRAINING_UPDATE))
