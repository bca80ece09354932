"""One training run: a method, a network, data and a seed. A killed run continues from its last epoch, bit for bit."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from nmcompile.paper.checkpoint import Position, load_checkpoint, read_position, save_checkpoint
from nmcompile.paper.data import Data, every, orders_of_epoch
from nmcompile.paper.machine import machine
from nmcompile.paper.methods import Method, describe
from nmcompile.paper.networks import build_network
from nmcompile.paper.processes import is_first, own_device, parallel, rank_and_size, share_buffers, summed
from nmcompile.paper.recipe import Recipe

CALIBRATION = 512
TEST_BATCH = 500

Configuration = dict[str, str | int | float | None]


@dataclass(frozen=True)
class Phase:
    """A part of a run: its share of the epochs, and its learning rate as a multiple of the recipe's."""

    share: float = 1.0
    rate: float = 1.0


@dataclass(frozen=True)
class Run:
    """A run.

    Args:
        row: the name of the method in tables.
        phases: one for each model that the method makes.
    """

    row: str
    method: Method
    network: str
    recipe: Recipe
    seed: int
    phases: tuple[Phase, ...] = (Phase(),)

    def configuration(self, data: Data) -> Configuration:
        """Return everything that decides the result, except versions and the machine."""
        phases = " ".join(f"{phase.share:g}x{phase.rate:g}" for phase in self.phases)
        head: Configuration = {"method": describe(self.method), "network": self.network}
        return {**head, "data": data.name, **asdict(self.recipe), "phases": phases, "seed": self.seed}


@dataclass(frozen=True)
class Outcome:
    """A finished run: its configuration, the test after each epoch, its time, and where it ran."""

    configuration: Configuration
    curve: list[dict[str, float | None]]
    seconds: float
    machine: dict[str, str | int] = field(default_factory=machine)

    def last(self, metric: str) -> float:
        """Return a metric after the last epoch; NaN if training diverged."""
        value = self.curve[-1][metric]
        return math.nan if value is None else value


def train_run(run: Run, data: Data, checkpoint: Path) -> Outcome:
    """Train, or finish training, and return the outcome; `checkpoint` is the file of the unfinished run."""
    configuration = run.configuration(data)
    found = read_position(checkpoint)
    start = found if found is not None and found.configuration == configuration else None
    position = start or Position(configuration, phase=0, epoch=0, curve=[], seconds=0.0)
    calibration = data.first(CALIBRATION, run.recipe.batch)
    device = own_device()
    model = build_network(run.network, calibration[0], data.classes, run.seed).to(device)
    inputs = [x.to(device) for x in calibration]
    # A resumed run makes the phases before the last one only for their models: the checkpoint has what they trained.
    for number, (phase, part) in enumerate(zip(run.phases, run.method(model, inputs), strict=True)):
        if number >= position.phase:
            loaded = checkpoint if start is not None and number == start.phase else None
            position = _train_phase(run, phase, part, data, replace(position, phase=number), checkpoint, loaded)
    return Outcome(configuration, position.curve, position.seconds)


def _train_phase(
    run: Run, phase: Phase, model: nn.Module, data: Data, position: Position, checkpoint: Path, loaded: Path | None
) -> Position:
    optimizer = run.recipe.make_optimizer(model)
    if loaded is not None:
        load_checkpoint(loaded, model, optimizer)
    trained = parallel(model)
    first, end = _epochs(run, position.phase)
    for epoch in range(position.epoch, end):
        started = time.perf_counter()
        progress = (epoch - first) / (end - first), (epoch + 1 - first) / (end - first)
        train_loss = _train_epoch(run, phase, trained, optimizer, data, epoch, progress)
        tested = test(model, data)
        curve = [*position.curve, {"train loss": _finite(train_loss), **tested}]
        passed = position.seconds + time.perf_counter() - started
        position = replace(position, epoch=epoch + 1, curve=curve, seconds=passed)
        if is_first():
            save_checkpoint(checkpoint, position, model, optimizer)
    return position


def _epochs(run: Run, number: int) -> tuple[int, int]:
    """Return the first epoch of a phase, and that of the next one."""
    ends = [round(run.recipe.epochs * sum(phase.share for phase in run.phases[:k])) for k in (number, number + 1)]
    return ends[0], ends[1]


def _train_epoch(
    run: Run,
    phase: Phase,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    epoch: int,
    progress: tuple[float, float],
) -> float:
    """Train for an epoch, in which the schedule goes from one progress to the other; return the mean loss."""
    rank, size = rank_and_size()
    count = min(run.recipe.images or len(data.train), len(data.train))
    orders = orders_of_epoch(count, run.recipe.batch, run.seed, epoch)
    own = [order[rank::size] for order in orders]
    total, (start, end), (device, dtype) = 0.0, progress, _place(model)
    model.train()
    shown = f"{run.row}, seed {run.seed}, epoch {epoch + 1} of {run.recipe.epochs}"
    bar = tqdm(total=len(own), desc=shown, unit="step", leave=False, disable=None if is_first() else True)
    for step, (x, y) in enumerate(data.train.batches(own, hash((run.seed, epoch, rank)))):
        for group in optimizer.param_groups:
            group["lr"] = phase.rate * run.recipe.rate_at(start + (end - start) * step / len(own))
        optimizer.zero_grad()
        loss = _loss(model, x, y, device, dtype)
        loss.backward()
        optimizer.step()
        total += loss.item()
        bar.update()
    bar.close()
    sums = summed(torch.tensor([total, len(own)], dtype=torch.float64, device=device))
    return (sums[0] / sums[1]).item()


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(model.parameters())
    return parameter.device, parameter.dtype


def _scores(model: nn.Module, x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the scores, `(samples or tokens, classes)` float32."""
    x = x.to(device, dtype if x.is_floating_point() else x.dtype)
    scores: Tensor = model(x)
    return scores.flatten(0, -2).float()


def _loss(model: nn.Module, x: Tensor, y: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return F.cross_entropy(_scores(model, x, device, dtype), y.to(device).flatten())


@torch.no_grad()
def test(model: nn.Module, data: Data) -> dict[str, float | None]:
    """Return the accuracy in percent and the mean loss, in nats, over the test samples (or their tokens)."""
    share_buffers(model)
    model.eval()
    device, dtype = _place(model)
    own: Sequence[Tensor] = every(torch.arange(len(data.test)).split(TEST_BATCH), *rank_and_size())
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for x, y in data.test.batches(own, 0):
        scores, labels = _scores(model, x, device, dtype), y.to(device).flatten()
        right = (scores.argmax(1) == labels).sum()
        sums += torch.stack([right, F.cross_entropy(scores, labels, reduction="sum"), torch.tensor(len(labels))])
    right_share, loss, count = summed(sums).tolist()
    return {"accuracy": 100 * right_share / count, "loss": _finite(loss / count)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
