"""The cuSPARSELt backend without a GPU: its rules, and its layers with a library that PyTorch computes."""

import copy
from operator import getitem
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nmcompile
from nmcompile import CompileConfig, NMPattern, Phase
from nmcompile.backends.cusparselt import CusparseltBackend
from nmcompile.backends.cusparselt.library import CUSPARSELT, Library
from nmcompile.backends.cusparselt.operators import (
    linear_forward,
    linear_input_gradient,
    pointwise_forward,
    pointwise_input_gradient,
)
from nmcompile.backends.cusparselt.support import Sizes, float16_refusal, operand_refusal, padded
from nmcompile.backends.cusparselt.update import linear_parameter_gradients, linear_weight_gradient
from nmcompile.backends.reference.linear import linear_bias_gradient
from nmcompile.backends.shared import choose_kernel as choices
from nmcompile.backends.shared.sparse_operand import pattern_support
from nmcompile.backends.triton.support import KEEP
from nmcompile.custom_op import operator_of
from nmcompile.errors import BackendUnavailable
from nmcompile.ir.choice import Choice
from nmcompile.ir.choice_slot import ChoiceSlot
from nmcompile.ir.node_meta import find_meta, meta_of
from nmcompile.pruning import OPERATORS
from tests.backends.fake_cusparselt import FakeLibrary, pruned
from tests.graph_census import check_recordable, graphs_of, written


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (Sizes(64, 64, 8), Sizes(64, 64, 8)),
        (Sizes(1, 1, 1), Sizes(64, 64, 8)),
        (Sizes(65, 36, 9), Sizes(128, 64, 16)),
        (Sizes(4096, 1024, 13008), Sizes(4096, 1024, 13008)),
    ],
)
def test_padding(sizes: Sizes, expected: Sizes) -> None:
    assert padded(sizes) == expected


class Loaded(Library):
    """A library of some version, or one that cannot be loaded."""

    def __init__(self, version: tuple[int, int, int] | None) -> None:
        super().__init__("loaded")
        self._version = version

    def version(self) -> tuple[int, int, int]:
        if self._version is None:
            raise OSError
        return self._version


@pytest.mark.parametrize(
    ("version", "words"), [((0, 8, 0), "0.8.0, slower than others on Hopper"), ((0, 10, 1), "cuSPARSELt 0.10.1")]
)
def test_the_version_is_told_and_a_bad_one_is_named(
    version: tuple[int, int, int], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    support = CusparseltBackend(Loaded(version)).available()
    assert support.ok and words in support.reason
    assert "libcusparseLt.so.0" in Loaded(None).support().reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old one")
    assert "capability (7, 5)" in Loaded(version).support().reason
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert "without cuSPARSELt" in Loaded(version).support().reason


@pytest.mark.parametrize(
    ("pattern", "ok"), [("2:4", True), ("1:2", True), ("1:4", True), ("4:8", False), ("3:4", False)]
)
def test_patterns(pattern: str, ok: bool) -> None:
    assert pattern_support(NMPattern.parse(pattern)).ok is ok


def test_without_the_library_a_request_for_it_says_why() -> None:
    if CUSPARSELT.support().ok:
        pytest.skip("cuSPARSELt is there")
    with pytest.raises(BackendUnavailable, match="'cusparselt' cannot run here: "):
        nmcompile.compile(nn.Linear(8, 8), backend="cusparselt")


@pytest.mark.parametrize(("capability", "refused"), [((9, 0), True), ((8, 0), False), ((10, 0), False)])
def test_a_kernel_that_ends_the_process_is_left_alone(capability: tuple[int, int], refused: bool) -> None:
    assert ("ends the process" in float16_refusal(capability)) is refused


def layers() -> list[tuple[nn.Module, Tensor]]:
    return [
        (nn.Linear(20, 12), torch.randn(3, 5, 20)),
        (nn.Linear(16, 32, bias=False), torch.randn(7, 16)),
        (nn.Conv2d(8, 16, 1), torch.randn(2, 8, 3, 5)),
        (nn.Conv2d(8, 16, 1, bias=False), torch.randn(2, 8, 3, 5).contiguous(memory_format=torch.channels_last)),
        (nn.Conv1d(8, 16, 1), torch.randn(2, 8, 5)),
    ]


@pytest.mark.parametrize("mode", ["t-weights", "training"])
@pytest.mark.parametrize("index", range(5))
def test_a_layer_trains_as_with_the_reference_backend(index: int, mode: str, library: FakeLibrary) -> None:
    layer, x = layers()[index]
    results: list[list[Tensor]] = []
    for backend in (CusparseltBackend(library), "reference"):
        torch.manual_seed(0)
        compiled = nmcompile.compile(layer, mode, config=CompileConfig(ends="sparse"), backend=backend)
        leaf = x.detach().requires_grad_()
        y = compiled(leaf)
        gradients = torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])
        results.append([y, *gradients])
        if backend != "reference":
            kernels = nmcompile.inspect(compiled).layer("").kernels
            assert "gemm: cusparselt" in kernels[Phase.FORWARD] and "gemm: cusparselt" in kernels[Phase.BACKWARD]
            is_sparse = mode == "training" and isinstance(layer, nn.Linear)
            assert f"gemm: {'cusparselt' if is_sparse else 'reference'}" in kernels[Phase.UPDATE]
    assert library.functions.sizes, "the library was not called"
    for ours, theirs in zip(*results, strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_compiled_graphs_and_copies_multiply_by_the_same_library(library: FakeLibrary) -> None:
    config, x = CompileConfig(ends="sparse"), torch.randn(8, 64)
    layer = nmcompile.compile(nn.Linear(64, 64), "t-weights", config=config, backend=CusparseltBackend(library))
    expected = layer(x)
    for run in (copy.deepcopy(layer), torch.compile(layer, backend="aot_eager", fullgraph=True)):
        before = len(library.functions.sizes)
        y = run(x)
        y.sum().backward()
        assert torch.equal(y, expected) and len(library.functions.sizes) > before


@pytest.mark.parametrize("mode", ["t-weights", "training"])
def test_cuda_graphs_can_record_what_it_runs(mode: str, library: FakeLibrary) -> None:
    net, config = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), CompileConfig(ends="sparse")
    graphs = graphs_of(
        nmcompile.compile(net, mode, config=config, backend=CusparseltBackend(library)), torch.randn(64, 64)
    )
    check_recordable(graphs)
    assert not written(graphs.forward) and all(x.dim() == 0 for x in written(graphs.backward).values())
    assert "cusparselt" in str(graphs.forward.graph) and "cusparselt" in str(graphs.backward.graph)


@pytest.mark.parametrize(
    ("layer", "mode", "words"),
    [
        (nn.Conv2d(8, 8, 3), "t-weights", "only 1x1 convolutions"),
        (nn.Conv2d(8, 8, 1, stride=2), "t-weights", "only 1x1 convolutions"),
        (nn.Linear(8, 8), "gradients", "not pruned"),
        (nn.Conv2d(8, 8, 1), "training", "pruned across the batch"),
    ],
)
def test_refusals(layer: nn.Module, mode: str, words: str, library: FakeLibrary) -> None:
    compiled = nmcompile.compile(layer, mode, config=CompileConfig(ends="sparse"), backend=CusparseltBackend(library))
    graphs = nmcompile.inspect(compiled).layer("").graphs
    nodes = [node for phase in (Phase.FORWARD, Phase.UPDATE) for node in graphs[phase].graph.nodes]
    refusals = [one for meta in map(find_meta, nodes) if meta is not None for one in meta.refusals]
    assert any(one.backend == "cusparselt" and words in one.reason for one in refusals)


def test_other_devices_and_dtypes_run_dense_and_say_so() -> None:
    assert "on cpu" in operand_refusal(CUSPARSELT, torch.ones(2, dtype=torch.float16))
    meta = torch.ones(2, device="meta")
    x, w = torch.randn(4, 8), pruned(8, 8)
    slot = ChoiceSlot("fc forward")
    assert torch.equal(linear_forward(x, w, None, None, False, CUSPARSELT.name, slot.name), F.linear(x, w))
    assert "meta" in operand_refusal(CUSPARSELT, meta)
    choice = slot.latest
    assert choice is not None and choice.kernel == "dense" and "not on cuda" in choice.reason


@pytest.mark.parametrize(
    ("dtype", "device", "refused"),
    [(torch.bfloat16, "cuda:0", False), (torch.float16, "cuda:0", True), (torch.bfloat16, "cuda:1", True)],
)
def test_operands_of_two_types_or_devices_are_refused(dtype: torch.dtype, device: str, refused: bool) -> None:
    def operand_on(dtype: torch.dtype, device: str) -> Any:
        return SimpleNamespace(dtype=dtype, device=torch.device(device), numel=lambda: 1, is_cuda=True)

    refusal = operand_refusal(CUSPARSELT, operand_on(torch.bfloat16, "cuda:0"), operand_on(dtype, device))
    assert bool(refusal) is refused
    assert not refused or (str(dtype) in refusal and device in refusal)


CHECKS = "test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fakes_and_schemas(layout: torch.memory_format, library: FakeLibrary) -> None:
    x, w, b, dy = torch.randn(3, 5, 8), pruned(12, 8), torch.randn(12), torch.randn(3, 5, 12)
    key = torch.tensor(3)
    for transposed in (False, True):
        weight = w.t().contiguous() if transposed else w
        torch.library.opcheck(
            operator_of(linear_forward), (x, weight, None, b, transposed, library.name, "a"), test_utils=CHECKS
        )
        other = pruned(12, 8, dim=0).t().contiguous() if transposed else pruned(12, 8, dim=0)
        given = dy, other, other != 0, transposed, library.name, "b"
        torch.library.opcheck(operator_of(linear_input_gradient), given, test_utils=CHECKS)
        rule = "mvue", 2, 4, "auto", key
        update = dy, x, *rule, transposed, library.name, "c"
        torch.library.opcheck(operator_of(linear_weight_gradient), update, test_utils=CHECKS)
        torch.library.opcheck(operator_of(linear_parameter_gradients), update, test_utils=CHECKS)
    x, dy = (torch.randn(2, c, 3, 4).contiguous(memory_format=layout) for c in (8, 12))
    torch.library.opcheck(
        operator_of(pointwise_forward), (x, pruned(12, 8, 1, 1), None, b, library.name, "d"), test_utils=CHECKS
    )
    weight = pruned(12, 8, 1, 1, dim=0)
    torch.library.opcheck(
        operator_of(pointwise_input_gradient), (dy, weight, weight != 0, x, library.name, "e"), test_utils=CHECKS
    )


@pytest.mark.parametrize("kernel", ["sparse", "dense"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images_lie_as_the_input_does_whatever_the_weight(
    layout: torch.memory_format, kernel: str, library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice(kernel, "the test asks for it"))
    x, dy = torch.randn(2, 8, 3, 4).contiguous(memory_format=layout), torch.randn(2, 12, 3, 4)
    forward, backward = (
        torch.empty_strided((12, 8, 1, 1), (8, 1, 8, 8)).copy_(pruned(12, 8, 1, 1, dim=dim)) for dim in (1, 0)
    )
    assert forward.is_contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(
        operator_of(pointwise_forward), (x, forward, None, None, library.name, "a"), test_utils=CHECKS
    )
    assert pointwise_forward(x, forward, None, None, library.name, "a").is_contiguous(memory_format=layout)
    torch.library.opcheck(
        operator_of(pointwise_input_gradient), (dy, backward, None, x, library.name, "a"), test_utils=CHECKS
    )
    assert pointwise_input_gradient(dy, backward, None, x, library.name, "a").is_contiguous(memory_format=layout)


@pytest.mark.parametrize(("bias", "target"), [(True, linear_parameter_gradients), (False, linear_weight_gradient)])
def test_the_update_gemm_also_sums_the_gradient_that_it_prunes(
    bias: bool, target: object, library: FakeLibrary
) -> None:
    layer = nn.Linear(8, 8, bias)
    compiled = nmcompile.compile(layer, config=CompileConfig(ends="sparse"), backend=CusparseltBackend(library))
    graph = nmcompile.inspect(compiled).layer("").graphs[Phase.UPDATE].graph
    gemm, *views = (node for node in graph.nodes if node.op == "call_function")
    assert gemm.target is target
    assert [node.target for node in views] == (2 * [getitem] if bias else [])
    metas = [meta_of(node) for node in (gemm, *views)]
    assert [(meta.kind, meta.planned is None) for meta in metas] == [("gemm", False), *([("view", True)] * len(views))]
    returned: Any = graph.output_node().args[0]
    assert [node.args for node in returned] == ([(gemm, 0), (gemm, 1)] if bias else [gemm.args])


@pytest.mark.parametrize("axis", ["auto", "batch"])
@pytest.mark.parametrize("kernel", ["sparse", "dense"])
def test_a_bias_gradient_is_the_sum_before_pruning(
    kernel: str, axis: str, library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice(kernel, "the test asks for it"))
    dy, x, key = torch.randn(4, 48, 12), torch.randn(4, 48, 8), torch.tensor(5)
    rule: Any = "mvue", 2, 4, axis, key, False, library.name, "u"
    for dtype in (torch.float32, torch.bfloat16):
        given = dy.to(dtype), x.to(dtype)
        weight, bias = linear_parameter_gradients(*given, *rule)
        assert weight.equal(linear_weight_gradient(*given, *rule))
        eager = linear_bias_gradient(*given)
        assert bias.dtype == dtype and (kernel == "sparse" or bias.equal(eager))
        torch.testing.assert_close(bias, eager)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("axis", ["auto", "flat", "batch"])
def test_updates_prune_as_the_reference_does(axis: str, transposed: bool, library: FakeLibrary) -> None:
    dy, x, key = torch.randn(4, 6, 12), torch.randn(4, 6, 8), torch.tensor(5)
    dim_0 = dy if axis == "batch" else dy.flatten(0, 1)
    zeros = OPERATORS["mvue"].prune(dim_0, "2:4", 0, key).view(24, 12)
    expected = zeros.t() @ x.flatten(0, 1)
    expected = expected.t() if transposed else expected
    result = linear_weight_gradient(dy, x, "mvue", 2, 4, axis, key, transposed, library.name, "u")
    torch.testing.assert_close(result, expected)
    if axis != "batch":
        given = zeros.view_as(dy)
        result = linear_weight_gradient(given, x, KEEP, 2, 4, axis, None, transposed, library.name, "u")
        torch.testing.assert_close(result, expected)
