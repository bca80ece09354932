"""The choice between the sparse and the dense kernel, with timings that the tests set."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile.backends.cpu import cost
from nmcompile.backends.cpu.conv import conv_forward, conv_input_gradient, conv_weight_gradient
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.backends.cpu.linear import linear_forward, linear_input_gradient, linear_weight_gradient
from nmcompile.backends.cpu.typical_cost import CALL, COPIED_BYTE, COPIES, DRAWS, HOST, CpuCosts
from nmcompile.backends.shared import choose_kernel as choices
from nmcompile.backends.shared import known_choices, timing
from nmcompile.backends.shared.choose_kernel import SMALL, run_best
from nmcompile.backends.shared.cost_model import Gemm, Pruned, pruned_seconds
from nmcompile.backends.shared.known_choices import forget
from nmcompile.backends.shared.recent import Recent
from nmcompile.backends.shared.saved_choices import load_choices, save_choices
from nmcompile.custom_op import operator_of
from nmcompile.errors import FileError, StateError
from nmcompile.ir.choice import Choice
from nmcompile.ir.choice_slot import ChoiceSlot

native = pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason)
DENSE, SPARSE = torch.tensor(0), torch.tensor(1)


@pytest.fixture(autouse=True)
def nothing_measured() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Return the time of each kernel, for the test to set."""
    times = {"dense": 1.0, "sparse": 1.0}

    def seconds(run: Callable[[], object], device: torch.device | None) -> float:
        return times["sparse" if run() is SPARSE else "dense"]

    monkeypatch.setattr(choices, "seconds", seconds)
    return times


def run(problem: object = "a", size: int = SMALL, predicted: float = 1.5) -> tuple[Tensor, Choice]:
    return run_best(lambda: problem, size, lambda: predicted, lambda: SPARSE, lambda: DENSE)


@pytest.mark.parametrize(("sparse_seconds", "chosen"), [(0.5, SPARSE), (0.94, SPARSE), (0.99, DENSE), (2.0, DENSE)])
def test_the_faster_kernel_runs(timed: dict[str, float], sparse_seconds: float, chosen: Tensor) -> None:
    timed["sparse"] = sparse_seconds
    result, choice = run()
    assert result is chosen
    kernel = "sparse" if chosen is SPARSE else "dense"
    assert choice == Choice(kernel, "measured", 1.5, 1.0, sparse_seconds)


def test_equal_problems_are_measured_once(timed: dict[str, float]) -> None:
    timed["sparse"] = 0.5
    first = run()
    timed["sparse"] = 2.0
    assert run() == first and first[0] is SPARSE
    assert run(problem="b")[0] is DENSE
    forget()
    assert run()[0] is DENSE


def disturb(monkeypatch: pytest.MonkeyPatch, sparse_times: list[float]) -> list[float]:
    """Give the sparse kernel these times in turn, and the dense one 1.0 each; return the times that are left."""
    left = list(sparse_times)
    monkeypatch.setattr(choices, "seconds", lambda run, device: left.pop(0) if run() is SPARSE else 1.0)
    return left


def test_what_another_program_disturbs_is_measured_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sparse kernel needs 0.5, but each of its first calls is held up for another time."""
    left = disturb(monkeypatch, [3.0, 4.0, 1.2, 2.0, 3.0] + [0.5] * 5)
    assert run()[0] is DENSE
    results = [run()[0] for _ in range(2 * known_choices.DOUBTED_CALLS)]
    again = known_choices.DOUBTED_CALLS
    assert results == [DENSE] * again + [SPARSE] * (len(results) - again)
    assert not left and run()[0] is SPARSE


def test_on_a_machine_that_is_never_quiet_a_problem_is_measured_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    left = disturb(monkeypatch, [1.0, 0.2, 2.0, 2.0, 2.0] * 10)
    for _ in range(10 * known_choices.DOUBTED_CALLS):
        assert run()[0] is SPARSE
    assert len(left) == 50 - 5 * known_choices.MEASUREMENTS


def test_a_graph_captures_a_doubted_choice_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    disturb(monkeypatch, [1.0, 0.2, 2.0, 2.0, 2.0])
    run()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for _ in range(2 * known_choices.DOUBTED_CALLS):
        assert run()[0] is SPARSE


def test_only_the_problems_that_were_used_last_are_remembered(
    timed: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_choices, "_measured", Recent(2))
    timed["sparse"] = 0.5
    for problem in ("a", "b", "a", "c"):
        run(problem)
    timed["sparse"] = 2.0
    assert run("a")[0] is SPARSE and run("c")[0] is SPARSE
    assert run("b")[0] is DENSE, "measured again"
    assert run("a")[0] is DENSE, "dropped for b"


def test_choices_outlive_the_process_in_a_file(
    timed: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed["sparse"] = 0.5
    problem = ("forward", (3, 4), None)
    _, measured = run(problem)
    save_choices(tmp_path / "choices.json")
    forget()
    load_choices(tmp_path / "choices.json")
    monkeypatch.setattr(choices, "seconds", lambda run: pytest.fail("measured"))
    assert run(problem) == (SPARSE, measured)
    forget()
    save_choices(tmp_path / "none.json")
    load_choices(tmp_path / "none.json")


def test_a_file_of_another_machine_or_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "choices.json"
    save_choices(path)
    path.write_text(path.read_text().replace(torch.__version__, "1.0"))
    with pytest.raises(StateError, match="measured with"):
        load_choices(path)
    for text in ("", "[]", "{}", '{"setting": {}, "choices": {"a": {"kernel": 1, "colour": 2}}}'):
        path.write_text(text)
        with pytest.raises(FileError, match="cannot be read"):
            load_choices(path)
    with pytest.raises(FileError, match="missing"):
        load_choices(tmp_path / "missing.json")


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(choices, "seconds", lambda run: pytest.fail("measured"))
    assert run() == (DENSE, choices.CAPTURING)


def test_a_small_gemm_runs_dense_and_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "seconds", lambda run: pytest.fail("measured"))
    result, choice = run(size=SMALL - 1)
    assert result is DENSE and choice.kernel == "dense" and "small" in choice.reason and choice.speedup is None


def test_where_algorithms_have_to_be_deterministic_no_clock_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "seconds", lambda run: pytest.fail("measured"))
    torch.use_deterministic_algorithms(True)
    try:
        assert run(predicted=0.5)[0] is SPARSE and run(size=SMALL - 1)[0] is DENSE
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_operand_that_keeps_too_much_runs_dense_and_is_not_remembered(timed: dict[str, float]) -> None:
    timed["sparse"] = 0.5
    for _ in range(2):  # before and after the measurement
        result, choice = run_best(lambda: "a", SMALL, lambda: 1.0, lambda: None, lambda: DENSE)
        assert result is DENSE and choice.kernel == "dense" and "NaN" in choice.reason
        assert run()[0] is SPARSE


COSTS = cost.Costs(linear=1.0, convolution=0.8, read=4.0, sparse=10.0, pack=8.0, copy=2.0)


@pytest.mark.parametrize(
    ("rows", "depth", "lanes", "is_linear", "expected"),
    [
        # One tile of 8 vectors; loads 8 + 2.
        (64, 32, 128, True, (64 * 32 * 128 + 64 * 32 * 4) / (64 * 32 * 10 * 10 + 64 * 32 * 8 + 32 * 128 * 2)),
        (64, 32, 128, False, (64 * 32 * 128 * 0.8 + 64 * 32 * 4) / (64 * 32 * 10 * 10 + 64 * 32 * 8 + 32 * 128 * 2)),
        # One lane takes a whole vector, and does not share the loads of the values.
        (64, 32, 1, True, (64 * 32 + 64 * 32 * 4) / (64 * 32 * 3 * 10 + 64 * 32 * 8 + 32 * 2)),
        # Two tasks over the rows copy twice.
        (2048, 32, 16, True, (2048 * 32 * 16 + 2048 * 32 * 4) / (2048 * 32 * 3 * 10 + 2048 * 32 * 8 + 32 * 16 * 2 * 2)),
    ],
)
def test_the_cost_model(
    monkeypatch: pytest.MonkeyPatch, rows: int, depth: int, lanes: int, is_linear: bool, expected: float
) -> None:
    monkeypatch.setattr(cost, "costs_here", lambda threads: COSTS)
    assert cost.predicted_speedup(rows, depth, lanes, is_linear, threads=1) == pytest.approx(expected)


@native
def test_the_costs_of_this_machine_are_measured_without_touching_the_random_state() -> None:
    state = torch.get_rng_state()
    assert cost.predicted_speedup(512, 512, 512, True, threads=torch.get_num_threads()) > 0
    assert torch.equal(state, torch.get_rng_state())


@native
def test_the_report_shows_what_was_chosen(timed: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "SMALL", 512)
    monkeypatch.setattr(choices, "measure", lambda *_: (Choice("sparse", "measured", 1.4, 0.003, 0.002), True))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    compiled = nmcompile.compile(model, config=nmcompile.CompileConfig(ends="sparse"))
    assert "are chosen when their GEMM first runs" in str(nmcompile.inspect(compiled))
    compiled(torch.randn(8, 8)).sum().backward()
    report = nmcompile.inspect(compiled)
    forward = report.layer("0").choices[nmcompile.Phase.FORWARD]
    assert forward == Choice("sparse", "measured", 1.4, 0.003, 0.002) and forward.speedup == pytest.approx(1.5)
    text = report.full()
    assert "sparse: 3.00 / 2.00 ms = 1.50, predicted 1.40" in text and "dense: small, 0.00 M multiplications" in text
    assert "had a sparse kernel; those measured take 4.0 ms, and 6.0 ms with dense kernels" in text
    assert "Pruned operands take part in 100.0% of the MACs of all three GEMMs." in text
    assert '"dense_seconds": 0.003' in report.to_json() and "| sparse: 3.00 / 2.00 ms" in report.to_markdown()


@native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_run_dense_and_say_so(dtype: torch.dtype) -> None:
    x, weight = torch.randn(8, 16, dtype=dtype), torch.randn(4, 16, dtype=dtype)
    slot = ChoiceSlot("fc forward")
    got = linear_forward(x, weight, None, None, False, slot.name)
    assert torch.equal(got, nn.functional.linear(x, weight))
    assert slot.latest is not None and f"no sparse kernel for {dtype} on cpu" in slot.latest.reason


@native
def test_mixed_dtypes_are_refused_as_pytorch_refuses_them() -> None:
    with pytest.raises(RuntimeError, match="same dtype"):
        linear_forward(torch.randn(8, 16), torch.randn(4, 16).bfloat16(), None, None, False, "fc forward")


@native
def test_the_cost_model_is_measured_whatever_the_default_dtype() -> None:
    cost.costs_here.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert cost.predicted_speedup(512, 512, 512, True, threads=1) > 0
    finally:
        torch.set_default_dtype(torch.float32)


@native
@pytest.mark.parametrize("groups", [1, 2])
def test_an_expanded_weight_takes_a_mask(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice("sparse", "the test asks for it"))
    x, row = torch.randn(3, 8 * groups, 5, 6), torch.randn(1, 8, 1, 1)
    weight, mask = row.expand(12, 8, 3, 3), (torch.arange(8) % 4 < 2)[:, None, None].expand(12, 8, 3, 3)
    geometry = [1, 1], [0, 0], [1, 1], groups
    expected = torch.nn.functional.conv2d(x, weight * mask, groups=groups)
    torch.testing.assert_close(conv_forward(x, weight, mask, None, *geometry, "a"), expected, rtol=1e-4, atol=1e-4)


@native
@pytest.mark.parametrize("kernel", ["sparse", "dense"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fakes_schemas_and_compiled_graphs(
    kernel: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`opcheck` runs the operators with fake tensors and through AOTAutograd, and compares sizes and strides."""
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice(kernel, "the test asks for it"))
    checks = "test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic"
    x, w, b, dy = torch.randn(3, 5, 8), torch.randn(12, 8), torch.randn(12), torch.randn(3, 5, 12)
    mask = torch.arange(12)[:, None].add(torch.arange(8)) % 4 < 2
    pruned = dy.flatten(0, 1)
    pruned[(torch.arange(15) % 4) > 1] = 0
    for transposed in (False, True):
        weight, kept = (w.t().contiguous(), mask.t().contiguous()) if transposed else (w, mask)
        torch.library.opcheck(operator_of(linear_forward), (x, weight, kept, b, transposed, "a"), test_utils=checks)
        torch.library.opcheck(
            operator_of(linear_input_gradient), (dy, weight, kept, transposed, "b"), test_utils=checks
        )
        arguments = pruned.view(dy.shape), x, transposed, "flat", 4, "c"
        torch.library.opcheck(operator_of(linear_weight_gradient), arguments, test_utils=checks)
    x, w = (t.contiguous(memory_format=layout) for t in (torch.randn(4, 8, 6, 7), torch.randn(12, 8, 3, 3)))
    mask = torch.empty_like(w, dtype=torch.bool).copy_(mask[:, :, None, None])
    dy = torch.randn(4, 12, 3, 3).contiguous(memory_format=layout)
    dy[2:] = 0
    geometry = [2, 2], [1, 0], [1, 1], 1
    torch.library.opcheck(operator_of(conv_forward), (x, w, mask, b, *geometry, "d"), test_utils=checks)
    torch.library.opcheck(operator_of(conv_input_gradient), (dy, w, mask, x, *geometry, "e"), test_utils=checks)
    torch.library.opcheck(operator_of(conv_weight_gradient), (dy, x, w, *geometry, "auto", 4, "f"), test_utils=checks)


def test_a_gpu_is_timed_without_what_asks_for_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("record")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            assert end is not self
            return 2.0

    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append(f"sleep {cycles}"))
    assert timing.seconds(lambda: done.append("run"), torch.device("cuda", 1), 7) == 0.002
    assert done == ["sleep 7", "record", "run", "record", "wait"]


@pytest.mark.parametrize(
    ("gemm", "low", "high"),
    [
        (Gemm(1024, 1024, 1024, 1, True, torch.float32), 1.5, 2.0),
        (Gemm(64, 576, 25088, 1, False, torch.float32), 1.1, 1.5),
        (Gemm(4096, 1024, 1, 1, True, torch.float32), 0.0, 0.5),
    ],
)
def test_a_typical_processor_gains_where_zen_4_did(gemm: Gemm, low: float, high: float) -> None:
    costs, grouped = CpuCosts(), gemm._replace(groups=3)
    dense, sparse = costs.dense_seconds(gemm), costs.sparse_seconds(gemm, is_cached=False)
    assert sparse is not None and low < dense / sparse < high
    assert costs.dense_seconds(grouped) - CALL == pytest.approx(3 * (dense - CALL))
    packed = costs.sparse_seconds(gemm, is_cached=True)
    assert packed is not None and packed < sparse


@pytest.mark.parametrize(("has_kernel", "kernel"), [(True, "sparse"), (False, "dense")])
def test_the_pruning_of_an_operand_is_predicted_for_the_kernel_that_runs(has_kernel: bool, kernel: str) -> None:
    costs, gemm = CpuCosts(), Gemm(1024, 1024, 1024, 1, True, torch.float32)
    gradient = Pruned("grad_output", 2**20, "mvue 2:4", has_kernel=True, is_fused=True, is_cached=False)
    product = costs.sparse_seconds(gemm, False) if has_kernel else costs.dense_seconds(gemm)
    copies, copy = (DRAWS if has_kernel else COPIES["mvue 2:4"]), 2 * 4 * 2**20 * COPIED_BYTE
    assert product is not None
    assert pruned_seconds(costs, gemm, [gradient], has_kernel) == pytest.approx(product + copies * copy + HOST)


def test_a_small_product_is_predicted_to_run_dense() -> None:
    costs, gemm = CpuCosts(), Gemm(64, 64, 64, 1, True, torch.float32)
    assert pruned_seconds(costs, gemm, [], has_kernel=True) == pytest.approx(costs.dense_seconds(gemm) + HOST)
