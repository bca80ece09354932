"""Train a Transformer whose weights FSDP2 splits, save it with torch.distributed.checkpoint, and go on.

    torchrun --nproc-per-node 2 examples/train_fsdp2.py --folder checkpoint
    torchrun --nproc-per-node 1 examples/train_fsdp2.py --folder checkpoint   # goes on, on another number of processes

It runs on GPUs, or on CPUs with gloo.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import nmcompile

WIDTH, TOKENS, WORDS = 64, 32, 96


class Model(nn.Module):
    """A causal Transformer of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x, mask = self.embedding(words), nn.Transformer.generate_square_subsequent_mask(words.shape[1], words.device)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(x)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """Return what a checkpoint holds: the masks and random streams are plain tensors, equal on all processes."""
    weights, moments = get_state_dict(model, optimizer)
    return {"weights": weights, "moments": moments, "sparse": nmcompile.sparse_state_dict(model)}


def resume(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Load a checkpoint; the sparse state comes last."""
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["weights"], optim_state_dict=state["moments"])
    nmcompile.load_sparse_state_dict(model, state["sparse"])


def main(folder: Path, steps: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    torch.manual_seed(0)  # every process makes the same model and the same plan
    model = nmcompile.compile(Model().to(device), mode="training", inplace=True)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    if folder.exists():
        resume(model, optimizer, folder)

    data = torch.Generator().manual_seed(dist.get_rank())  # each process has a batch of its own
    for _ in range(steps):
        words = (torch.randint(WORDS, (8, 1), generator=data) + torch.arange(TOKENS + 1)).remainder(WORDS).to(device)
        loss = F.cross_entropy(model(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    dcp.save(state_of(model, optimizer), storage_writer=dcp.FileSystemWriter(folder, overwrite=True))

    ok = nmcompile.verify(nmcompile.finalize(model)).ok  # every process takes part
    if dist.get_rank() == 0:
        print(f"loss {loss.item():.3f}, every block holds: {ok}, {dist.get_world_size()} processes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, required=True, help="of the checkpoint: loaded if it exists, then written"
    )
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        main(options.folder, options.steps)
    finally:
        dist.destroy_process_group()
