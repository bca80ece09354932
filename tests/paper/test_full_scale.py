"""Full scale as far as two processes on a CPU can run it: a folder of images, the paper's recipe, a kill, a resume."""

import importlib
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nmcompile.errors import ConfigError
from nmcompile.paper import train
from nmcompile.paper.checkpoint import read_position
from nmcompile.paper.data import CIFAR_FILES, load_data
from nmcompile.paper.methods import weights_and_gradients
from nmcompile.paper.recipe import PAPER
from nmcompile.paper.train import Outcome, Run, train_run

WORLD, CLASSES, IMAGES, BATCH = 2, 4, 24, 8
RECIPE = replace(PAPER, epochs=2, batch=BATCH)  # three steps each
RUN = Run("sparse", weights_and_gradients("mvue", "1:2", refresh=2), "small-bottleneck", RECIPE, 0)


class Killed(BaseException):
    """Stands for the signal that ends a process."""


def write_images(folder: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    drawn = np.random.default_rng(0)
    for part, count in (("train", IMAGES), ("val", BATCH)):
        for number in range(count):
            path = folder / part / f"class{number % CLASSES}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pil.fromarray(drawn.integers(256, size=(40, 40, 3), dtype=np.uint8)).save(path)


def outcomes(folder: Path) -> tuple[Outcome, Outcome]:
    """Return an uninterrupted run, and one that was killed in its second epoch and started again."""
    importlib.import_module("tests.conftest")  # makes torchvision importable
    image_folder = importlib.import_module("nmcompile.paper.image_folder")
    data = image_folder.load_image_folder(folder, size=32, workers=0)
    whole = train_run(RUN, data, folder / "whole")
    tests, killed = train.test, folder / "killed"
    with mock.patch.object(train, "test") as patched, pytest.raises(Killed):
        patched.side_effect = lambda *args: tests(*args) if patched.call_count == 1 else _kill()
        train_run(RUN, data, killed)
    position = read_position(killed)
    assert position is not None and position.epoch == 1
    return whole, train_run(RUN, data, killed)


def _kill() -> None:
    raise Killed


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    whole, resumed = outcomes(folder)
    torch.save([whole.curve, resumed.curve], folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_resume_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    write_images(tmp_path)
    mp.spawn(worker, (tmp_path,), nprocs=WORLD)  # type: ignore[attr-defined]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD))
    assert first[0] == first[1] and len(first[0]) == 2
    assert first == second


def test_full_scale_asks_for_its_data() -> None:
    with pytest.raises(ConfigError, match="give --data DIR"):
        load_data("imagenet", None)


def cifar_file(count: int, seed: int) -> bytes:
    drawn = np.random.default_rng(seed)
    records = drawn.integers(256, size=(count, 1 + 3 * 32 * 32), dtype=np.uint8)
    records[:, 0] %= 10
    return records.tobytes()


def test_cifar_is_standardized_by_channel(tmp_path: Path) -> None:
    for number, name in enumerate(CIFAR_FILES):
        (tmp_path / name).write_bytes(cifar_file(4, number))
    data = load_data("images", tmp_path)
    assert (data.name, len(data.train), len(data.test), data.classes) == ("CIFAR-10", 20, 4, 10)
    bytes_of = [np.frombuffer(cifar_file(4, number), np.uint8).reshape(4, -1) for number in range(6)]
    train_images = np.concatenate(bytes_of[:5])[:, 1:].reshape(20, 3, 32, 32).astype(np.float64)
    mean, std = (f(train_images, axis=(0, 2, 3), keepdims=True) for f in (np.mean, np.std))
    ((x, y),) = data.test.batches([torch.arange(4)], 0)
    expected = (bytes_of[5][:, 1:].reshape(4, 3, 32, 32) - mean) / std
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-4)
    assert y.tolist() == bytes_of[5][:, 0].tolist()


def test_crops_are_windows_of_the_padded_image(tmp_path: Path) -> None:
    for number, name in enumerate(CIFAR_FILES):
        (tmp_path / name).write_bytes(cifar_file(4, number))
    data = load_data("images", tmp_path)
    ((plain, _),) = data.test.batches([torch.arange(4)], 0)
    source = replace(data.test, crops=True)  # type: ignore[type-var]
    ((x, _),) = source.batches([torch.arange(4)], 5)
    padded = torch.nn.functional.pad(plain, (4, 4, 4, 4))
    for image, crop in zip(padded, x, strict=True):
        windows = [image[:, d : d + 32, r : r + 32] for d in range(9) for r in range(9)]
        assert any(torch.equal(crop, window) or torch.equal(crop, window.flip(2)) for window in windows)


@pytest.mark.parametrize("content", [b"", b"x", cifar_file(1, 0)[:-1], b"\x0b" + bytes(3072)])
def test_damaged_cifar_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / CIFAR_FILES[0]).write_bytes(content)
    with pytest.raises(ConfigError, match="not of CIFAR-10's binary version"):
        load_data("images", tmp_path)
