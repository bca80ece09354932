"""Processes that train split models: what several tests run in them."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import nmcompile
from nmcompile import CompileConfig
from nmcompile.training.find_masks import masks_of

STEPS = 5
PARTS = 4  # of a batch, however many processes share them
Job = Callable[[int, Path], dict[str, Any]]


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def compiled(mode: str, refresh: Any = "steady") -> Any:
    torch.manual_seed(0)
    config = CompileConfig(refresh=refresh, ends="sparse", sr_ste=0.01)
    return nmcompile.compile(nn.Sequential(block(), nn.ReLU(), block()), mode, config=config, inplace=True)


def part(index: int, step: int) -> Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(PARTS * step + index))


def train(model: nn.Module, optimizer: Optimizer, steps: Iterable[int], rank: int = 0, ranks: int = 1) -> None:
    """Train on this process's parts of each batch; `ranks` processes average their gradients."""
    for step in steps:
        optimizer.zero_grad()
        for index in range(rank, PARTS, ranks):
            (model(part(index, step)).square().sum() * ranks / PARTS).backward()
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def found(model: nn.Module) -> dict[str, Any]:
    """Return the whole weights and the sparse state of a trained model, its masks up to date."""
    model.eval()
    model(part(0, 0))
    return {"weights": [whole(one) for one in model.parameters()], "sparse": nmcompile.sparse_state_dict(model)}


def zero(mode: str, refresh: Any = "steady") -> Job:
    """Split the optimizer's state: ZeRO's first stage."""

    def job(rank: int, folder: Path) -> dict[str, Any]:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # uses a deprecated part of torch

        model = compiled(mode, refresh)
        split = DistributedDataParallel(model)
        optimizer = ZeroRedundancyOptimizer(split.parameters(), SGD, lr=0.1)
        for step in range(STEPS):  # DDP's buckets expect one backward call after another
            optimizer.zero_grad()
            x = torch.cat([part(index, step) for index in range(rank, PARTS, dist.get_world_size())])
            (split(x).square().sum() * dist.get_world_size() / PARTS).backward()
            optimizer.step()
        return found(model)

    return job


def shard(model: Any, mesh: Any, checkpointed: bool = False) -> nn.Module:
    """Split each block and the model by FSDP2, with activation checkpointing of the blocks on request."""
    for index in (0, 2):
        if checkpointed:
            model[index] = checkpoint_wrapper(model[index])
        fully_shard(model[index], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def saved(mode: str, checkpointed: bool = True) -> Job:
    """Train under FSDP2, and save in the middle with torch.distributed.checkpoint."""

    def job(rank: int, folder: Path) -> dict[str, Any]:
        model, optimizer = _sharded(mode, checkpointed)
        ranks = dist.get_world_size()
        train(model, optimizer, range(STEPS), rank, ranks)
        save(_state(model, optimizer), checkpoint_id=folder / "saved")
        middle = {"weights": [whole(one) for one in model.parameters()], "sparse": nmcompile.sparse_state_dict(model)}
        train(model, optimizer, range(STEPS, 2 * STEPS), rank, ranks)
        return {"middle": middle, "end": found(model)}

    return job


def resumed(mode: str, checkpointed: bool = True) -> Job:
    """Load what `saved` wrote, and train to the end, on any number of processes."""

    def job(rank: int, folder: Path) -> dict[str, Any]:
        torch.manual_seed(1 + rank)
        model, optimizer = _sharded(mode, checkpointed)
        state = _state(model, optimizer)
        load(state, checkpoint_id=folder / "saved")
        set_state_dict(model, optimizer, model_state_dict=state["weights"], optim_state_dict=state["moments"])
        nmcompile.load_sparse_state_dict(model, state["sparse"])
        middle = {"weights": [whole(one) for one in model.parameters()], "sparse": nmcompile.sparse_state_dict(model)}
        train(model, optimizer, range(STEPS, 2 * STEPS), rank, dist.get_world_size())
        return {"middle": middle, "end": found(model)}

    return job


def _sharded(mode: str, checkpointed: bool) -> tuple[nn.Module, Optimizer]:
    model = shard(compiled(mode), init_device_mesh("cpu", (dist.get_world_size(),)), checkpointed)
    return model, AdamW(model.parameters(), 0.01)


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"weights": weights, "moments": moments, "sparse": nmcompile.sparse_state_dict(model)}


def accelerate(mode: str, refresh: Any = "steady") -> Job:
    """Split the model by FSDP2 as Accelerate does; it does so on accelerators only, unless its state says otherwise."""

    def job(rank: int, folder: Path) -> dict[str, Any]:
        from accelerate import Accelerator, FullyShardedDataParallelPlugin
        from accelerate.utils import DistributedType

        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Sequential"]
        )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        accelerator.state._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        model = compiled(mode, refresh)
        model, optimizer = accelerator.prepare(model, SGD(model.parameters(), 0.1))
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        train(model, optimizer, range(STEPS), rank, dist.get_world_size())
        return found(model)

    return job


def methods(mode: str) -> Job:
    """Call a method of a model under FSDP2, beside its forward."""

    class Encoder(nn.Sequential):
        def encode(self, x: Tensor) -> Tensor:
            return x @ self.get_parameter("0.weight").T

    def job(rank: int, folder: Path) -> dict[str, Any]:
        config = CompileConfig(ends="sparse")
        torch.manual_seed(0)
        model: Any = nmcompile.compile(Encoder(nn.Linear(8, 16), nn.Linear(16, 8)), mode, config=config, inplace=True)
        alone = model.encode(part(0, 0)).detach()
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        register_fsdp_forward_method(model, "encode")
        split = model.encode(part(0, 0)).detach()
        final: Any = nmcompile.finalize(model)
        return {"alone": alone, "split": split, "final": final.encode(part(0, 0)).detach()}

    return job


def two_dims(mode: str, refresh: Any = "steady") -> Job:
    """Split weights by pairs of processes, and over the pairs by FSDP2."""

    def job(rank: int, folder: Path) -> dict[str, Any]:
        mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
        styles = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        plan = {f"{index}.{layer}": style for index in (0, 2) for layer, style in styles.items()}
        model = shard(parallelize_module(compiled(mode, refresh), mesh["tensor"], plan), mesh["data"])
        optimizer = SGD(model.parameters(), 0.1)
        train(model, optimizer, range(STEPS), mesh["data"].get_local_rank(), mesh["data"].size())
        return found(model)

    return job


def pipeline(schedule: Any, mode: str, refresh: Any = "steady") -> Job:
    """Train a model whose layers are spread over the processes, two stages on each if the schedule takes several."""

    def job(rank: int, folder: Path) -> dict[str, Any]:
        model, ranks = compiled(mode, refresh), dist.get_world_size()
        layers = [
            nn.Sequential(model[0][0], model[0][1]),
            model[0][2],
            nn.Sequential(model[1], *model[2][:2]),
            model[2][2],
        ]
        takes_several = issubclass(schedule, PipelineScheduleMulti)
        pieces = layers if takes_several else [nn.Sequential(*layers[:2]), nn.Sequential(*layers[2:])]
        mine = list(range(rank, len(pieces), ranks))
        stages = [_stage(pieces, index) for index in mine]
        run = schedule(stages if takes_several else stages[0], PARTS, loss_fn=_distance, scale_grads=False)
        held = [parameter for index in mine for parameter in pieces[index].parameters()]
        optimizer = SGD(held, 0.01)
        for step in range(STEPS):
            optimizer.zero_grad()
            batch = torch.cat([part(index, step) for index in range(PARTS)])
            run.step(*([batch] if rank == 0 else []), **({"target": -batch} if rank == ranks - 1 else {}))
            optimizer.step()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        sparse = {name: x for index in mine for name, x in nmcompile.sparse_state_dict(pieces[index]).items()}
        return {"weights": {names[id(one)]: one.detach().clone() for one in held}, "sparse": sparse}

    return job


def _stage(pieces: list[nn.Module], index: int) -> PipelineStage:
    """Return a stage that knows its shapes: it need not find them by a backward call of its own, which would draw."""
    shapes = [part(0, 0)]
    with torch.no_grad():
        for piece in pieces:
            shapes.append(piece(shapes[-1]))
    first, last = (
        torch.empty_like(x, requires_grad=index > 0 or x is not shapes[0]) for x in shapes[index : index + 2]
    )
    return PipelineStage(
        pieces[index], index, len(pieces), torch.device("cpu"), input_args=(first,), output_args=(last,)
    )


def _distance(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum()


def alone(mode: str, refresh: Any = "steady", rate: float = 0.1, steps: int = STEPS) -> nn.Module:
    """Return the model that one process trains on whole batches by SGD."""
    model = compiled(mode, refresh)
    model(part(0, 0))
    train(model, SGD(model.parameters(), rate), range(steps))
    return model


def mask_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.mask": mask.tensor for name, mask in masks_of(model).items()}


def run_jobs(ranks: int, folder: Path, jobs: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Run jobs, each a name of this module and its arguments, one after another on the same processes.

    Returns:
        The results of each process, by the jobs' names.
    """
    if ranks == 1:
        return [_results(0, 1, folder, jobs)]
    mp.spawn(_worker, (ranks, folder, jobs), nprocs=ranks)  # type: ignore[attr-defined]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def _worker(rank: int, ranks: int, folder: Path, jobs: Mapping[str, Sequence[Any]]) -> None:
    torch.save(_results(rank, ranks, folder, jobs), folder / f"{rank}.pt")


def _results(rank: int, ranks: int, folder: Path, jobs: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    store = f"file://{folder}/store{ranks}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    try:
        results = {name: globals()[job](*arguments)(rank, folder) for name, (job, *arguments) in jobs.items()}
        dist.barrier()
        return results
    finally:
        dist.destroy_process_group()
