"""ZeRO, pipelines, FSDP2 with tensor parallelism, and checkpoints that go on with another number of processes."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

import nmcompile
from tests.training.split_models import PARTS, STEPS, alone, compiled, mask_tensors, part, run_jobs, train

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")

TWO = {
    "zero": ("zero", "t-weights"),
    "pipeline": ("pipeline", Schedule1F1B, "t-weights"),
    "drawn pipeline": ("pipeline", Schedule1F1B, "training"),
    "saved": ("saved", "training"),
    "accelerate": ("accelerate", "t-weights"),
    "methods": ("methods", "t-weights"),
}
SCHEDULES = [Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble]
SWEPT = {
    f"{job} {mode} {refresh}": (job, mode, refresh)
    for job, mode, refresh in product(["zero", "two_dims"], ["t-weights", "training"], ["steady", 2])
}
PIPELINES = {f"pipeline {one.__name__}": ("pipeline", one, "t-weights", 2) for one in SCHEDULES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("split")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    """Return the results of two processes in all jobs: starting them takes longer than their work."""
    return run_jobs(2, folder, TWO)


@pytest.fixture(scope="module")
def one(two: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Return the result of one process that goes on from the checkpoint of two."""
    return run_jobs(1, folder, {"resumed": ("resumed", "training")})[0]["resumed"]


def check_as_one_process(results: list[dict[str, Any]], mode: str, refresh: Any) -> None:
    """Hold a split training against that of one process: masks bit for bit, and weights where nothing is drawn."""
    first, *others = results
    for other in others:
        assert all(torch.equal(first["sparse"][name], other["sparse"][name]) for name in first["sparse"])
    if mode == "t-weights":
        expected = alone(mode, refresh)
        expected(part(0, 0))
        for weight, parameter in zip(first["weights"], expected.parameters(), strict=True):
            torch.testing.assert_close(weight, parameter.detach())
        assert all(torch.equal(first["sparse"][name], mask) for name, mask in mask_tensors(expected).items())


def check_pipeline(results: list[dict[str, Any]], refresh: Any) -> None:
    """Hold the union of all stages against the training of one process."""
    model = compiled("t-weights", refresh)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = torch.cat([part(index, step) for index in range(PARTS)])
        (model(batch) + batch).square().sum().backward()
        optimizer.step()
    weights = {name: weight for result in results for name, weight in result["weights"].items()}
    expected = dict(model.named_parameters())
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name].detach())


def test_zero_counts_each_step_once(two: list[dict[str, Any]]) -> None:
    check_as_one_process([rank["zero"] for rank in two], "t-weights", "steady")
    clocks = {name: clock for name, clock in two[0]["zero"]["sparse"].items() if name.endswith(".clock")}
    assert len(clocks) == 4 and all(clock[0] == STEPS for clock in clocks.values())


def test_fsdp2_of_accelerate_trains_as_one_process_does(two: list[dict[str, Any]]) -> None:
    check_as_one_process([rank["accelerate"] for rank in two], "t-weights", "steady")


def test_methods_beside_forward_multiply_by_gathered_weights(two: list[dict[str, Any]]) -> None:
    for rank in two:
        outputs = rank["methods"]
        assert torch.equal(outputs["alone"], outputs["split"])
        torch.testing.assert_close(outputs["final"], outputs["split"])


def test_a_pipeline_trains_as_one_process_does(two: list[dict[str, Any]]) -> None:
    check_pipeline([rank["pipeline"] for rank in two], "steady")


def test_a_pipeline_draws_once_for_each_part_of_a_batch(two: list[dict[str, Any]]) -> None:
    sparse = {name: value for rank in two for name, value in rank["drawn pipeline"]["sparse"].items()}
    assert all(sparse[f"{layer}.draw"] == PARTS * STEPS for layer in ("0.0", "0.2", "2.0", "2.2"))


def test_a_whole_model_takes_up_the_stages_of_a_pipeline(two: list[dict[str, Any]]) -> None:
    whole = compiled("training")
    parts = {
        what: {k: v for rank in two for k, v in rank["drawn pipeline"][what].items()} for what in ("weights", "sparse")
    }
    whole.load_state_dict(parts["weights"])
    nmcompile.load_sparse_state_dict(whole, parts["sparse"])
    assert all(torch.equal(parts["sparse"][name], mask) for name, mask in mask_tensors(whole).items())
    assert nmcompile.verify(nmcompile.finalize(whole)).ok


def check_resumed(saved: dict[str, Any], resumed: dict[str, Any]) -> None:
    """Compare bit for bit, and in what follows the masks' clocks: sums of gradients have another order."""
    before, after = saved["middle"], resumed["middle"]
    assert before["sparse"].keys() == after["sparse"].keys()
    assert all(torch.equal(before["sparse"][name], after["sparse"][name]) for name in before["sparse"])
    assert all(torch.equal(weight, other) for weight, other in zip(before["weights"], after["weights"], strict=True))
    clocks = [name for name in after["sparse"] if name.endswith(".clock")]
    assert all(torch.equal(saved["end"]["sparse"][name], resumed["end"]["sparse"][name]) for name in clocks)


def test_one_process_goes_on_where_two_stopped(two: list[dict[str, Any]], one: dict[str, Any]) -> None:
    check_resumed(two[0]["saved"], one)


def test_a_resumed_process_draws_as_one_that_was_not_interrupted(one: dict[str, Any]) -> None:
    """Train on from the loaded state in a plain model, without FSDP2: equal to the last bit."""
    plain = compiled("training")
    optimizer = torch.optim.AdamW(plain.parameters(), 0.01)
    with torch.no_grad():
        for parameter, weight in zip(plain.parameters(), one["middle"]["weights"], strict=True):
            parameter.copy_(weight)
    nmcompile.load_sparse_state_dict(plain, one["middle"]["sparse"])
    before = {name: int(value) for name, value in nmcompile.sparse_state_dict(plain).items() if name.endswith(".draw")}
    train(plain, optimizer, range(STEPS, 2 * STEPS))
    after = nmcompile.sparse_state_dict(plain)
    assert all(int(after[name]) == draws + PARTS * STEPS for name, draws in before.items())
    assert all(torch.equal(after[name], one["end"]["sparse"][name]) for name in before)


@pytest.mark.slow
def test_four_processes_go_on_where_two_stopped(two: list[dict[str, Any]], folder: Path) -> None:
    four = run_jobs(4, folder, {"resumed": ("resumed", "training")})
    for rank in four:
        check_resumed(two[0]["saved"], rank["resumed"])


@pytest.mark.slow
def test_every_combination_on_four_processes(tmp_path: Path) -> None:
    four = run_jobs(4, tmp_path, SWEPT)
    for name, (_, mode, refresh) in SWEPT.items():
        check_as_one_process([rank[name] for rank in four], mode, refresh)


@pytest.mark.slow
def test_every_schedule_of_a_pipeline(tmp_path: Path) -> None:
    two = run_jobs(2, tmp_path, PIPELINES)
    for name in PIPELINES:
        check_pipeline([rank[name] for rank in two], 2)


def test_weights_that_deepspeed_holds_in_parts_are_refused_by_name() -> None:
    """ZeRO stage 3 leaves parameters empty, and marks each with its full size."""
    model = nmcompile.compile(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)), "t-weights")
    weight = model.get_parameter("1.weight")
    setattr(weight, "ds_numel", weight.numel())  # noqa: B010 - parameters declare no such attribute
    nmcompile.finalize(model)  # gathered
    weight.data = torch.empty(0)
    with pytest.raises(nmcompile.NMCompileError, match=r"^1\.weight: DeepSpeed's ZeRO stage 3 .*GatheredParameters"):
        nmcompile.finalize(model)
