"""Every pass leaves graphs that keep the rules, and a graph that breaks one is found."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from torch import fx, nn

from nmcompile.backends.reference import ReferenceBackend
from nmcompile.capture import capture_model
from nmcompile.config import CompileConfig, Phase, preset, presets
from nmcompile.errors import LoweringError, PostconditionError, PreconditionError
from nmcompile.ir import operations as ops
from nmcompile.ir.layers import LinearLayer
from nmcompile.ir.node_meta import KEY, Kind, Refusal, kind_of, meta_of, nodes_of_kind, row_of, update_meta
from nmcompile.ir.program import Program
from nmcompile.ir.protocols import Pass, Support
from nmcompile.ir.verify_graphs import verify_graphs
from nmcompile.layer_config import LayerConfig
from nmcompile.passes import LowerNodes, compile_passes
from nmcompile.planning.plan_phases import plan_phases

PASSES = compile_passes([ReferenceBackend()])
EXPAND, *PRUNES, LOWER = PASSES
SDGP = LayerConfig(backward_gradient=replace(presets["weights"].weight, operator="sdgp"))  # type: ignore[type-var]


@dataclass(frozen=True)
class Refuses:
    """A backend that takes nothing."""

    name: str = "picky"

    def available(self) -> Support:
        return Support(True)

    def supports(self, node: fx.Node) -> Support:
        return Support(False, "not my kind")

    def lower(self, node: fx.Node) -> None:
        raise AssertionError("was never chosen")


def program_of(default: LayerConfig, passes: list[Pass], placement: str = "operand") -> Program:
    """Return convs, also grouped, and linears, with bias and without, after some passes."""
    model = nn.Sequential(
        nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3, groups=2, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(32, 8, bias=False), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3),
    )  # fmt: skip
    captured = capture_model(model)
    program = Program(captured, plan_phases(captured, default, CompileConfig(ends="sparse", placement=placement)))
    for one in passes:
        one.run(program)
    return program


@pytest.mark.parametrize("placement", ["operand", "activation"])
@pytest.mark.parametrize("default", [*presets.values(), SDGP], ids=[*presets, "sdgp"])
def test_after_each_pass_the_rules_hold(default: LayerConfig, placement: str) -> None:
    program = program_of(default, [], placement)
    for one in PASSES:
        one.run(program)
        verify_graphs(program, one.name)
    assert len(program.layers) == 5


def node_of(graph: fx.Graph, kind: Kind) -> fx.Node:
    return next(nodes_of_kind(graph, kind))


def read_the_dense_operand(graph: fx.Graph) -> None:
    prune = node_of(graph, "prune")
    prune.replace_all_uses_with(prune.all_input_nodes[0])
    graph.erase_node(prune)


def keep_fewer(graph: fx.Graph) -> None:
    prune = node_of(graph, "prune")
    prune.args = (*prune.args[:2], 1, 2, *prune.args[4:])


def draw_by_another_law(graph: fx.Graph) -> None:
    node_of(graph, "prune").update_arg(1, "uniform")


def group_across_the_batch(graph: fx.Graph) -> None:
    node_of(graph, "prune").update_arg(4, "batch")


def claim_another_axis(graph: fx.Graph) -> None:
    prune = node_of(graph, "prune")
    update_meta(prune, row=replace(row_of(prune), axis="flat"))  # type: ignore[type-var]


def drop_the_gemm(graph: fx.Graph) -> None:
    gemm = node_of(graph, "gemm")
    gemm.replace_all_uses_with(gemm.all_input_nodes[0])
    graph.erase_node(gemm)


def repeat_the_gemm(graph: fx.Graph) -> None:
    gemm = node_of(graph, "gemm")
    with graph.inserting_after(gemm):
        graph.node_copy(gemm)


def ask_for_what_nobody_has(graph: fx.Graph) -> None:
    with graph.inserting_before(next(iter(graph.nodes))):
        graph.placeholder("scale")


def forget_the_meta(graph: fx.Graph) -> None:
    del node_of(graph, "prune").meta[KEY]


def claim_another_layer(graph: fx.Graph) -> None:
    update_meta(node_of(graph, "gemm"), layer=LinearLayer("other", (8, 8), has_bias=True))


def claim_another_phase(graph: fx.Graph) -> None:
    update_meta(node_of(graph, "gemm"), phase=Phase.FORWARD)


def return_too_much(graph: fx.Graph) -> None:
    output = graph.output_node()
    output.args = ((*output.args[0], node_of(graph, "gemm")),)  # type: ignore[misc]


def prune_after_the_gemm(graph: fx.Graph) -> None:
    node_of(graph, "gemm").append(node_of(graph, "prune"))


BROKEN: list[tuple[Phase, Callable[[fx.Graph], None], str]] = [
    (Phase.FORWARD, read_the_dense_operand, "does not read what is planned: weight 2:4 transposable along in"),
    (Phase.BACKWARD, read_the_dense_operand, "does not read what is planned: weight 2:4 transposable along out"),
    (Phase.UPDATE, read_the_dense_operand, "does not read what is planned: grad_output 2:4 mvue along auto"),
    (Phase.UPDATE, keep_fewer, "'grad_output_pruned' is not what is planned: grad_output 2:4 mvue along auto"),
    (Phase.UPDATE, draw_by_another_law, "'grad_output_pruned' is not what is planned"),
    (Phase.UPDATE, group_across_the_batch, "'grad_output_pruned' is not what is planned"),
    (Phase.FORWARD, claim_another_axis, "does not read what is planned: weight 2:4 transposable along in"),
    *((phase, drop_the_gemm, "0 GEMM nodes") for phase in Phase),
    *((phase, repeat_the_gemm, "2 GEMM nodes") for phase in Phase),
    *((phase, ask_for_what_nobody_has, "nothing provides placeholder 'scale'") for phase in Phase),
    (Phase.BACKWARD, forget_the_meta, "'weight_pruned' carries no NodeMeta of this layer and phase"),
    (Phase.UPDATE, claim_another_layer, "'gemm_update' carries no NodeMeta of this layer and phase"),
    (Phase.UPDATE, claim_another_phase, "'gemm_update' carries no NodeMeta of this layer and phase"),
    (Phase.FORWARD, return_too_much, "2 outputs, expected 1"),
    (Phase.UPDATE, return_too_much, "3 outputs, expected 2"),
    (Phase.UPDATE, prune_after_the_gemm, "lint fails"),
]


@pytest.mark.parametrize(("phase", "break_it", "problem"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_graph_is_found(phase: Phase, break_it: Callable[[fx.Graph], None], problem: str) -> None:
    program = program_of(preset("training"), [EXPAND, *PRUNES])
    verify_graphs(program, "prune-gradients")
    break_it(program.layers["1"][phase].graph)
    expected = f"after prune-gradients: layer '1', {phase.value} graph: .*{re.escape(problem)}"
    with pytest.raises(PostconditionError, match=expected):
        verify_graphs(program, "prune-gradients")


@pytest.mark.parametrize("layer", ["1", "3", "6", "8"])
def test_a_removed_input_mask_is_found_in_every_kind_of_layer(layer: str) -> None:
    program = program_of(preset("activations"), list(PASSES))
    graph = program.layers[layer][Phase.FORWARD].graph
    node_of(graph, "view").replace_all_uses_with(next(iter(graph.nodes)))
    with pytest.raises(PostconditionError, match=f"layer '{layer}', forward graph: .*input 4:8 greedy_by_value along"):
        verify_graphs(program, "lower-nodes")


def test_pruning_that_is_not_planned_is_found() -> None:
    program = program_of(preset("weights"), [EXPAND, *PRUNES])
    three = program.layers["8"]
    update_meta(node_of(three[Phase.BACKWARD].graph, "view"), kind="prune", row=three.plan.rows_of(Phase.FORWARD)[0])
    with pytest.raises(PostconditionError, match="layer '8', backward graph: the GEMM reads what is not planned"):
        verify_graphs(program, "prune-gradients")


@pytest.mark.parametrize("skipped", range(len(PRUNES)), ids=lambda index: str(PRUNES[index].name))
def test_a_pass_that_was_left_out_is_noticed(skipped: int) -> None:
    phase = "update" if PRUNES[skipped].name == "prune-gradients" else "forward"
    program = program_of(
        EVERYTHING, [EXPAND, *(one for one in PRUNES if one is not PRUNES[skipped]), LOWER], "activation"
    )
    with pytest.raises(PostconditionError, match=f"after lower-nodes: layer '.', {phase} graph"):
        verify_graphs(program, LOWER.name)


EVERYTHING = replace(preset("inference"), update_gradient=preset("training").update_gradient)


@pytest.mark.parametrize("one", PRUNES, ids=lambda one: str(one.name))
def test_pruning_passes_refuse_lowered_graphs(one: Pass) -> None:
    program = program_of(EVERYTHING, [EXPAND, LOWER], "activation")
    with pytest.raises(PreconditionError, match=r"layer '1': its \w+ graph has 0 GEMM nodes that are not lowered"):
        one.run(program)


@pytest.mark.parametrize("one", PRUNES, ids=lambda one: str(one.name))
def test_passes_refuse_to_prune_or_quantize_an_operand_twice(one: Pass) -> None:
    program = program_of(EVERYTHING, [EXPAND, one], "activation")
    with pytest.raises(PreconditionError, match=r"layer '1': the GEMM of its \w+ graph .*; run each \w+ pass once"):
        one.run(program)


@pytest.mark.parametrize("one", PRUNES, ids=lambda one: str(one.name))
def test_passes_that_find_nothing_planned_change_nothing(one: Pass) -> None:
    program = program_of(preset("dense"), [EXPAND])
    before = {name: [str(graph.graph) for _, graph in three] for name, three in program.layers.items()}
    one.run(program)
    assert {name: [str(graph.graph) for _, graph in three] for name, three in program.layers.items()} == before


def test_unlowered_graphs_do_not_run() -> None:
    program = program_of(preset("dense"), [EXPAND])
    for phase in Phase:
        graph = program.layers["8"][phase]
        with pytest.raises(LoweringError, match="no backend has lowered it"):
            graph(*[None for node in graph.graph.nodes if node.op == "placeholder"])


def test_lowered_nodes_name_their_backend_and_who_refused_them() -> None:
    program = program_of(preset("training"), [EXPAND, *PRUNES, LowerNodes((Refuses(), ReferenceBackend()))])
    nodes = [node for three in program.layers.values() for _, graph in three for node in graph.graph.nodes]
    lowered = [meta_of(node) for node in nodes if kind_of(node) in ("gemm", "prune", "bias")]
    assert {meta.backend for meta in lowered} == {"reference"}
    assert all(meta.refusals == (Refusal(meta.kind, "picky", "not my kind"),) for meta in lowered)
    abstract = (ops.gemm_forward, ops.gemm_backward, ops.gemm_update, ops.add_bias, ops.bias_gradient)
    assert not any(node.target in abstract for node in nodes)


def test_a_node_that_no_backend_takes_is_an_error_that_names_it() -> None:
    program = program_of(preset("dense"), [EXPAND])
    with pytest.raises(LoweringError, match=r"layer '1': no backend takes its forward node .*picky: not my kind"):
        LowerNodes((Refuses(),)).run(program)


def test_lowering_twice_is_an_error() -> None:
    program = program_of(preset("dense"), [EXPAND, LOWER])
    with pytest.raises(LoweringError, match="layer '1'"):
        LOWER.run(program)
