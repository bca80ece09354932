"""Training that is killed and resumed, that runs in many threads, and that runs for long."""

import gc
import os
import random
import resource
import signal
import tempfile
import threading
import time
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile.files.write_atomically import write_atomically

STEPS = 30
LAST_TRY = 4  # of a training, which nobody kills
MOST = 600.0  # seconds


def start(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    plain = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    compiled = nmcompile.compile(plain, "training", inplace=True)
    return compiled, torch.optim.SGD(compiled.parameters(), 0.05, momentum=0.9)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return everything that training goes on from."""
    momenta = {f"momentum.{i}": s["momentum_buffer"] for i, s in enumerate(optimizer.state.values())}
    weights = {f"weight.{name}": value for name, value in model.state_dict().items()}
    sparse = {f"sparse.{name}": value for name, value in nmcompile.sparse_state_dict(model).items()}
    return {name: value.clone() for name, value in (momenta | weights | sparse).items()}


def _load(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    def part(of: str) -> dict[str, Tensor]:
        return {name.removeprefix(of): value for name, value in saved.items() if name.startswith(of)}

    model.load_state_dict(part("weight."))
    momenta = part("momentum.")
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(held):
        optimizer.state[parameter]["momentum_buffer"] = momenta[str(index)]
    nmcompile.load_sparse_state_dict(model, part("sparse."))


def _run(path: Path) -> None:
    """Train to the end from the file at `path`, if there is one, and write it after each step."""
    model, optimizer = start(0)
    first = 0
    if path.exists():
        saved = safetensors.torch.load_file(path)
        first = int(saved.pop("step"))
        _load(model, optimizer, saved)
    for number in range(first, STEPS):
        step(model, optimizer, number)
        state = tensors(model, optimizer) | {"step": torch.tensor(number + 1)}
        write_atomically(path, safetensors.torch.save(state))


def run_resumptions(count: int, seed: int) -> dict[str, int]:
    """Kill a training at random moments until it ends, and compare it with one that nobody killed, bit for bit."""
    dice, kills, equal = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        _run(Path(folder, "first"))  # loads what a training needs
        whole, began = Path(folder, "whole"), time.perf_counter()
        _run(whole)
        taken = time.perf_counter() - began
        expected = safetensors.torch.load_file(whole)
        for number in range(count):
            path, finished, tries = Path(folder, str(number)), False, 0
            while not finished:
                tries += 1
                finished = _killed_after(path, dice.random() * taken if tries < LAST_TRY else MOST)
                kills += not finished
            found = safetensors.torch.load_file(path)
            equal += all(torch.equal(found[name], value) for name, value in expected.items())
    result = {"trainings": count, "kills": kills, "equal bit for bit": equal}
    print("resumed", result)
    return result


def _killed_after(path: Path, seconds: float) -> bool:
    """Train in a child that is killed after a time; return whether it ended before."""
    child = os.fork()
    if not child:
        _run(path)
        os._exit(0)
    timer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
    timer.start()
    _, status = os.waitpid(child, 0)
    timer.cancel()
    return os.waitstatus_to_exitcode(status) == 0


def run_threads(threads: int, rounds: int) -> dict[str, int]:
    """Train models in threads at once, and compare each with the same training alone, bit for bit."""
    torch.set_num_threads(1)

    def train(seed: int, results: dict[int, dict[str, Tensor]]) -> None:
        model, optimizer = models[seed]
        for number in range(STEPS):
            step(model, optimizer, number)
        results[seed] = tensors(model, optimizer)

    equal = 0
    for _ in range(rounds):
        found: list[dict[int, dict[str, Tensor]]] = [{}, {}]
        models = {seed: start(seed) for seed in range(threads)}  # seeds are the process's, so models are made in turn
        for seed in range(threads):
            train(seed, found[0])
        models = {seed: start(seed) for seed in range(threads)}
        running = [threading.Thread(target=train, args=(seed, found[1])) for seed in range(threads)]
        for one in running:
            one.start()
        for one in running:
            one.join()
        equal += sum(
            all(torch.equal(found[1][seed][name], value) for name, value in alone.items())
            for seed, alone in found[0].items()
            if seed in found[1]
        )
    result = {"threads": threads, "trainings": threads * rounds, "equal bit for bit": equal}
    print("threads", result)
    return result


def run_long(steps: int) -> dict[str, int]:
    """Train for long; return how much resident memory grows after the first tenth."""
    model, optimizer = start(0)
    after_a_tenth = 0
    for number in range(steps):
        step(model, optimizer, number)
        if number + 1 == steps // 10:
            gc.collect()
            after_a_tenth = _resident()
    gc.collect()
    result = {"steps": steps, "growth in bytes": max(0, _resident() - after_a_tenth)}
    print("memory", result)
    return result


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
