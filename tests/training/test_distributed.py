"""Two processes on gloo: masks equal on all ranks, draws not, DDP and FSDP2."""

import os
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import nmcompile
from nmcompile import CompileConfig, profitability
from nmcompile.training.state import masks_of

WORLD = 2
STEPS = 5
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))


def compiled(mode: str, refresh: int | None = 2) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(block(), nn.ReLU(), block())
    return nmcompile.compile(model, mode, config=CompileConfig(refresh=refresh, ends="sparse", sr_ste=0.01))


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


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {"ddp": DistributedDataParallel, "fsdp2": sharded}
CASES = list(product(WRAPPERS, ["training", "t-weights"]))


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


def results(rank: int, wrapper: str, mode: str) -> dict[str, Tensor]:
    """Parameters and masks after training, and a weight gradient drawn before it from one batch for all ranks."""
    model = compiled(mode)
    last = dict(model.named_parameters())["2.2.weight"]
    drawn = torch.autograd.grad(model(data(0, 0)).square().sum(), [last])[0]
    wrapped = WRAPPERS[wrapper](model)
    train(wrapped, lambda step: [data(rank, step)])
    inner = wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped
    weights = {name: whole(parameter) for name, parameter in inner.named_parameters()}
    return copied_masks(inner) | weights | {"drawn": drawn}


def frozen_masks(rank: int) -> tuple[dict[str, Tensor], ...]:
    """Frozen masks of weights that were trained since: as they are, after sharding, and what they would be today."""
    model = compiled("t-weights", refresh=None)
    train(model, lambda step: [data(0, step)])
    before, fresh = copied_masks(model), compiled("t-weights")
    fresh.load_state_dict(model.state_dict())
    fresh(data(0, 0))
    train(sharded(model), lambda step: [data(rank, step)])
    return before, copied_masks(model), copied_masks(fresh)


def decided(rank: int) -> dict[str, Tensor]:
    """What `where="pays"` decides where the first rank would prune everything and the second nothing."""
    with mock.patch.object(profitability, "_typical_times", lambda steps, _: {p: len(p) * (rank - 0.5) for p in steps}):
        torch.manual_seed(0)
        config = CompileConfig(where="pays", ends="sparse")
        return nmcompile.sparse_state_dict(nmcompile.compile(block(), args=(data(0, 0),), config=config))


def failed(rank: int) -> str:
    """What a rank hears where the first one cannot measure."""
    with mock.patch.object(profitability, "_typical_times", side_effect=MemoryError("no room")):
        config = CompileConfig(where="pays", ends="sparse")
        try:
            nmcompile.compile(block(), args=(data(0, 0),), config=config)
        except (MemoryError, nmcompile.NMCompileError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def worker(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        found: dict[Any, Any] = {case: results(rank, *case) for case in CASES}
        found |= {"frozen": frozen_masks(rank), "decided": decided(rank), "failed": failed(rank)}
        torch.save(found, f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    """What every rank ended with, of all cases: starting processes takes longer than all that they do."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (folder,), nprocs=WORLD)  # type: ignore[attr-defined]
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_ranks_agree_on_masks_and_weights_but_draw_on_their_own(wrapper: str, ranks: list[dict[Any, Any]]) -> None:
    first, second = (rank[wrapper, "training"] for rank in ranks)
    names = set(first) - {"drawn"}
    assert sum(name.endswith(".mask") for name in names) == 4
    assert all(torch.equal(first[name], second[name]) for name in names)
    assert not torch.equal(first["drawn"], second["drawn"])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_masked_training_is_that_of_one_process(wrapper: str, ranks: list[dict[Any, Any]]) -> None:
    """Without draws two ranks compute what one computes on both halves of the batch, masks and SR-STE included."""
    found, alone = ranks[0][wrapper, "t-weights"], compiled("t-weights")
    alone(data(0, 0))
    train(alone, lambda step: [data(rank, step) for rank in range(WORLD)])
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach())
    assert all(torch.equal(found[f"{name}.mask"], mask.tensor) for name, mask in masks_of(alone).items())


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
