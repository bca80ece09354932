"""Two processes on gloo: masks equal on all ranks, draws not, under DDP, FSDP2 and tensor parallelism; not FSDP1."""

import copy
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import nmcompile
from nmcompile import CompileConfig
from nmcompile.api import measure_phases, whole_step
from nmcompile.training.find_masks import masks_of

WORLD = 2
STEPS = 5
Refresh = int | Literal["steady"] | None
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(block(), nn.ReLU(), block())


def compiled(mode: str, refresh: Refresh = 2, model: nn.Module | None = None) -> nn.Module:
    config = CompileConfig(refresh=refresh, ends="sparse", sr_ste=0.01)
    return nmcompile.compile(model or plain(), mode, config=config, inplace=True)


def copied_masks(model: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.mask": mask.tensor.clone() for name, mask in masks_of(model).items()}


def data(rank: int, step: int) -> Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(2 * step + rank))


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for child in model:  # type: ignore[attr-defined]
        if isinstance(child, nn.Sequential):
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def parallel(model: nn.Module) -> nn.Module:
    """Split the first block by columns and rows; all ranks compute the second alike."""
    return parallelize_module(
        model, init_device_mesh("cpu", (WORLD,)), {"0.0": ColwiseParallel(), "0.2": RowwiseParallel()}
    )


BUILDERS: dict[str, Callable[[str], nn.Module]] = {
    "ddp": lambda mode: DistributedDataParallel(compiled(mode)),
    "ddp, steady": lambda mode: DistributedDataParallel(compiled(mode, "steady")),
    "fsdp2": lambda mode: sharded(compiled(mode)),
    "fsdp2, steady": lambda mode: sharded(compiled(mode, "steady")),
    "fsdp2 first": lambda mode: compiled(mode, model=sharded(plain())),
    "parallel": lambda mode: parallel(compiled(mode)),
    "parallel first": lambda mode: compiled(mode, model=parallel(plain())),
}
CASES = list(product(BUILDERS, ["training", "t-weights"]))


def train(model: nn.Module, batches: Callable[[int], list[Tensor]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = batches(step)
        for x in parts:
            (model(x).square().sum() / len(parts)).backward()
        optimizer.step()


def whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()


def batches(builder: str, rank: int, step: int) -> list[Tensor]:
    """Return the data that a process trains on: its part, or everything if processes split only the weights."""
    return [data(r, step) for r in range(WORLD)] if "parallel" in builder else [data(rank, step)]


def results(rank: int, builder: str, mode: str) -> dict[str, Tensor]:
    """Return parameters and masks after training, and the outputs of the finalized and the trained model."""
    model = BUILDERS[builder](mode)
    train(model, lambda step: batches(builder, rank, step))
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    weights = {name: whole(parameter) for name, parameter in inner.named_parameters()}
    final = nmcompile.finalize(inner)
    assert [type(module) for module in final.modules()] == [type(module) for module in plain().modules()]
    assert nmcompile.verify(final).ok and nmcompile.verify(model).ok
    return copied_masks(inner) | weights | {"final": final(data(0, 9)).detach(), "output": model(data(0, 9)).detach()}


def drawn(rank: int) -> Tensor:
    """Return a weight gradient of one batch for all ranks."""
    model = compiled("training")
    last = dict(model.named_parameters())["2.2.weight"]
    return torch.autograd.grad(model(data(0, 0)).square().sum(), [last])[0]


def refused(run: Callable[[], Any]) -> str:
    """Return the project's error that this raises."""
    try:
        run()
    except nmcompile.NMCompileError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def flat(model: nn.Module, orig: bool) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=orig, device_id=torch.device("cpu"))


def of_fsdp1() -> list[str]:
    """Return the messages for a wrapped compiled model, also after it ran, and for compiling a wrapped one."""
    ran = compiled("weights", refresh=None)
    ran(data(0, 0))
    models = [flat(model, orig) for model in (compiled("t-weights"), ran) for orig in (True, False)]
    later = [refused(partial(model, data(0, 0))) for model in models]
    return later + [refused(partial(compiled, "weights", model=flat(plain(), orig))) for orig in (True, False)]


def misfits() -> dict[str, str]:
    """Return the messages for layers that cannot be split."""
    narrow = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    mesh, config = init_device_mesh("cpu", (WORLD,)), CompileConfig(ends="sparse")

    def run(mode: str, style: Any, layer: str = "0", **kwargs: Any) -> str:
        model = nmcompile.compile(copy.deepcopy(narrow), mode, config=config, **kwargs)
        return refused(lambda: parallelize_module(model, mesh, {layer: style})(data(0, 0)))

    return {
        "out": run("t-weights", ColwiseParallel()),
        "rows are masked one by one": run("weights", ColwiseParallel(output_layouts=Replicate())),
        "in": run("weights", RowwiseParallel(input_layouts=Replicate()), "2"),
        "quantized": run("inference", ColwiseParallel(), calibration=[data(0, 0)]),
        "copied": refused(lambda: nmcompile.compile(sharded(plain()))),
    }


def frozen_masks(rank: int) -> tuple[dict[str, Tensor], ...]:
    """Return frozen masks of weights trained since: as they are, after sharding, and as they would be today."""
    model = compiled("t-weights", refresh=None)
    train(model, lambda step: [data(0, step)])
    before, fresh = copied_masks(model), compiled("t-weights")
    fresh.load_state_dict(model.state_dict())
    fresh(data(0, 0))
    train(sharded(model), lambda step: [data(rank, step)])
    return before, copied_masks(model), copied_masks(fresh)


def decided(rank: int) -> dict[str, Tensor]:
    """Return the decision of `where="pays"` if the first rank would prune everything and the second nothing."""
    layers = mock.patch.object(
        measure_phases, "medians_in_turns", lambda steps, *_: {p: len(p) * (rank - 0.5) for p in steps}
    )
    with layers, mock.patch.object(whole_step, "step_times", lambda *_: (1.0 + rank, 2.0 - rank)):
        torch.manual_seed(0)
        config = CompileConfig(where="pays", ends="sparse")
        return nmcompile.sparse_state_dict(nmcompile.compile(block(), args=(data(0, 0),), config=config))


def failed(rank: int) -> str:
    """Return the error on a rank if the first rank cannot measure."""
    with mock.patch.object(measure_phases, "medians_in_turns", side_effect=MemoryError("no room")):
        config = CompileConfig(where="pays", ends="sparse")
        try:
            nmcompile.compile(block(), args=(data(0, 0),), config=config)
        except (MemoryError, nmcompile.NMCompileError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def failed_step(rank: int) -> tuple[str, bool]:
    """Return the warning on a rank if the second rank cannot run a whole step, and whether all layers stay pruned."""

    def times(*_: object) -> tuple[float, float]:
        if rank:
            raise MemoryError("no room")
        return 2.0, 1.0

    layers = mock.patch.object(measure_phases, "medians_in_turns", lambda steps, *_: {p: -len(p) for p in steps})
    with layers, mock.patch.object(whole_step, "step_times", times), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = CompileConfig(where="pays", ends="sparse")
        state = nmcompile.sparse_state_dict(nmcompile.compile(block(), args=(data(0, 0),), config=config))
    dense = [tensor for name, tensor in state.items() if name.endswith(".dense_phases")]
    return str(caught[0].message), bool(dense) and not any(tensor.any() for tensor in dense)


def worker(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        found: dict[Any, Any] = {case: results(rank, *case) for case in CASES}
        found |= {"frozen": frozen_masks(rank), "decided": decided(rank), "failed": failed(rank)}
        found["failed step"] = failed_step(rank)
        found |= {"drawn": drawn(rank), "fsdp1": of_fsdp1(), "misfits": misfits()}
        torch.save(found, f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    """Return the results of every rank in all cases: starting processes takes longer than their work."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (folder,), nprocs=WORLD)  # type: ignore[attr-defined]
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("builder", BUILDERS)
def test_ranks_agree_on_masks_and_weights(builder: str, ranks: list[dict[Any, Any]]) -> None:
    """Also without averaging of the gradients that they draw, for weights that tensor parallelism leaves whole."""
    first, second = (rank[builder, "training"] for rank in ranks)
    assert sum(name.endswith(".mask") for name in first) == 4
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_ranks_draw_on_their_own(ranks: list[dict[Any, Any]]) -> None:
    assert not torch.equal(ranks[0]["drawn"], ranks[1]["drawn"])


@pytest.mark.parametrize("builder", BUILDERS)
def test_masked_training_is_that_of_one_process(builder: str, ranks: list[dict[Any, Any]]) -> None:
    """Without draws two ranks compute what one computes on both halves of the batch, masks and SR-STE included."""
    alone = compiled("t-weights", "steady" if "steady" in builder else 2)
    found = ranks[0][builder, "t-weights"]
    alone(data(0, 0))
    train(alone, lambda step: [data(rank, step) for rank in range(WORLD)])
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach())
    assert all(torch.equal(found[f"{name}.mask"], mask.tensor) for name, mask in masks_of(alone).items())


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_split_model_is_finalized_as_a_whole_one(builder: str, ranks: list[dict[Any, Any]]) -> None:
    for rank in ranks:
        torch.testing.assert_close(rank[builder, "training"]["final"], rank[builder, "training"]["output"])


def test_fsdp1_is_refused_by_name(ranks: list[dict[Any, Any]]) -> None:
    for message in ranks[0]["fsdp1"]:
        assert re.match(r"(Config|Capture)Error: .*FSDP1.*fully_shard", message)


def test_layers_that_cannot_be_split_are_named(ranks: list[dict[Any, Any]]) -> None:
    assert ranks[0]["misfits"] == ranks[1]["misfits"]
    wanted = {
        "out": "ConfigError: layer '0': 12 out-features on 2 processes.* blocks of 4 ",
        "rows are masked one by one": "$",
        "in": "ConfigError: layer '2': 12 in-features on 2 processes.* blocks of 4 ",
        "quantized": "ConfigError: layer '0': it is quantized.*finalize",
        "copied": "CaptureError: .*inplace=True",
    }
    for name, message in ranks[0]["misfits"].items():
        assert re.match(wanted[name], message), name


def test_sharding_is_no_write_to_a_weight(ranks: list[dict[Any, Any]]) -> None:
    before, after, fresh = ranks[0]["frozen"]
    assert all(torch.equal(mask, before[name]) for name, mask in after.items())
    assert not all(torch.equal(mask, before[name]) for name, mask in fresh.items())


def test_the_first_rank_decides_what_pays(ranks: list[dict[Any, Any]]) -> None:
    first, second = (rank["decided"] for rank in ranks)
    assert list(first) == list(second)
    assert not any(tensor.any() for name, tensor in second.items() if name.endswith(".dense_phases"))


def test_a_failing_measurement_fails_everywhere(ranks: list[dict[Any, Any]]) -> None:
    first, second = (rank["failed"] for rank in ranks)
    assert first == "MemoryError: no room" and second.startswith("PassError") and second.endswith(first)


def test_a_step_that_fails_on_one_rank_decides_on_none(ranks: list[dict[Any, Any]]) -> None:
    for message, is_pruned in (rank["failed step"] for rank in ranks):
        assert "whole step could not be timed" in message and "MemoryError: no room" in message and is_pruned
