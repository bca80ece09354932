"""`nmcompile demo`: reading images, and one short run."""

import gzip
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner

from nmcompile.api.verify import TensorCheck, VerifyReport
from nmcompile.cli import cli
from nmcompile.demo import images as demo_images
from nmcompile.demo import run as demo_run
from nmcompile.demo.images import FILES, Images, load_images
from nmcompile.demo.resnet import ResNet
from nmcompile.demo.run import summary
from nmcompile.demo.steps import described
from nmcompile.demo.training import batches, evaluate
from nmcompile.errors import ConfigError
from nmcompile.pruning import NMPattern

Array = npt.NDArray[np.uint8]


def idx(array: Array) -> bytes:
    """Write the IDX format: two zero bytes, type 8 (unsigned byte), the dims, their sizes big-endian, the data."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()


def arrays(train: int = 40, test: int = 8) -> list[Array]:
    drawn = np.random.default_rng(0)
    shapes = (train, 8, 8), (train,), (test, 8, 8), (test,)
    return [drawn.integers(256 if len(s) == 3 else 10, size=s, dtype=np.uint8) for s in shapes]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, array in zip(FILES, arrays(), strict=True):
        (tmp_path / name).write_bytes(idx(array))
    return tmp_path


def assert_holds(loaded: Images) -> None:
    train_x, train_y, test_x, test_y = arrays()
    scaled = (train_x.astype(np.float64) - train_x.mean()) / train_x.std(ddof=1)
    torch.testing.assert_close(loaded.train_images, torch.from_numpy(scaled).float().unsqueeze(1))
    assert loaded.train_labels.tolist() == train_y.tolist() and loaded.test_labels.tolist() == test_y.tolist()
    assert loaded.test_images.shape == (len(test_x), 1, 8, 8)


def test_idx_files(folder: Path) -> None:
    assert_holds(load_images(folder))


def test_gzipped_idx_files(folder: Path) -> None:
    for name in FILES:
        path = folder / name
        (folder / f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert_holds(load_images(folder))


GOOD = idx(arrays()[0])
HUGE = bytes((0, 0, 8, 3)) + (2**32 - 1).to_bytes(4, "big") * 3
HOSTILE = {
    "empty": b"",
    "header alone": GOOD[:4],
    "half a header": GOOD[:10],
    "truncated": GOOD[:-1],
    "too long": GOOD + b"\0",
    "floats": GOOD[:2] + b"\x0d" + GOOD[3:],
    "other dims": idx(arrays()[1]),
    "sizes whose product overflows": HUGE + b"\0" * 64,
    "sizes whose 64-bit product is 0": bytes((0, 0, 8, 3)) + (2**31).to_bytes(4, "big") * 2 + (4).to_bytes(4, "big"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("packed", [False, True])
def test_hostile_header_is_an_error_that_names_the_file(case: str, packed: bool, folder: Path) -> None:
    path = folder / FILES[0]
    path.unlink()
    path = path.with_name(f"{FILES[0]}.gz") if packed else path
    path.write_bytes(gzip.compress(HOSTILE[case]) if packed else HOSTILE[case])
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        load_images(folder)


@pytest.mark.parametrize("data", [b"no gzip", gzip.compress(GOOD)[:-9]])
def test_broken_gzip_is_an_error_that_names_the_file(data: bytes, folder: Path) -> None:
    (folder / FILES[0]).unlink()
    (folder / f"{FILES[0]}.gz").write_bytes(data)
    with pytest.raises(ConfigError, match=f"{FILES[0]}.gz"):
        load_images(folder)


def test_missing_file_is_an_error_that_names_it(folder: Path) -> None:
    (folder / FILES[2]).unlink()
    with pytest.raises(ConfigError, match=FILES[2]):
        load_images(folder)


def test_digits_where_no_folder_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo_images, "FASHION_MNIST", tmp_path / "absent")
    digits = load_images(None)
    assert digits.train_images.shape == (1297, 1, 8, 8) and digits.test_images.shape == (500, 1, 8, 8)
    assert abs(digits.train_images.mean().item()) < 1e-5 and abs(digits.train_images.std().item() - 1) < 1e-5
    assert set(digits.train_labels.tolist()) == set(range(10))


def test_installed_images_come_first(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(demo_images, "FASHION_MNIST", folder)
    assert_holds(load_images(None))


def test_batches_cover_each_epoch_once_in_an_order_of_their_own(folder: Path) -> None:
    images = load_images(folder)
    epochs = [torch.cat([x for x, _ in batches(images, 40, 1, seed)]) for seed in (0, 0, 1)]
    assert torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[0], epochs[2])
    sums = [epoch.sum((1, 2, 3)).sort().values for epoch in (*epochs, images.train_images)]
    assert all(torch.equal(one, sums[-1]) for one in sums)


@pytest.mark.parametrize("size", [8, 28])
def test_resnet_has_78_thousand_parameters(size: int) -> None:
    model = ResNet(size, 10)
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 10)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1000) == 78


def test_evaluate_counts_right_answers(folder: Path) -> None:
    images = load_images(folder)

    class Constant(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(x), 10).index_fill(1, images.test_labels[:1], 1.0)

    right = (images.test_labels == images.test_labels[0]).sum().item() / len(images.test_labels)
    accuracy, loss = evaluate(Constant(), images)
    assert accuracy == pytest.approx(100 * right)
    normalizer = float(np.log(9 + np.e))
    assert loss == pytest.approx(normalizer - right)


def test_short_run_trains_compares_and_verifies(folder: Path) -> None:
    arguments = ["demo", "--data", str(folder), "--epochs", "1", "--train-images", "32"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "32 for training, 8 for test, 1 epochs" in result.output
    assert result.output.count("every block holds") == 2
    assert all(f"\n{name} " in result.output for name in ("dense", "sparse", "difference"))
    assert all(name in result.output for name in ("layers.0.conv1", "W 2:4", "dY 2:4", "ONNX Runtime: relative L2"))
    lines = result.output.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120  # one screen


def check(name: str, violations: int) -> TensorCheck:
    return TensorCheck(name, "weight", "in", NMPattern(2, 4), 500, violations)


def test_blocks_that_hold_are_summed_up_and_broken_ones_listed() -> None:
    held = [check(f"layer{i}", 0) for i in range(40)]
    assert summary("weights", VerifyReport(tuple(held))) == "weights: 20,000 blocks in 40 checks, every block holds"
    shown = summary("weights", VerifyReport((*held, check("odd", 3)))).splitlines()
    assert shown[0] == "weights: 20,500 blocks in 41 checks" and shown[-1] == "1 of 1 checks fail"
    assert [line.split()[::5] for line in shown if "odd" in line] == [["odd", "3"]] and len(shown) == 6


def test_the_run_follows_from_its_seed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_run, "step_times", lambda *_: "")  # not compared, and they take the most time
    arguments = ["demo", "--data", str(folder), "--epochs", "1", "--train-images", "32"]
    first, again = (CliRunner().invoke(cli, [*arguments, "--seed", "1"], catch_exceptions=False) for _ in range(2))
    assert without_times(first.output) == without_times(again.output)


def without_times(text: str) -> list[str]:
    """Return a run's results without its times, which differ in each run."""
    return [
        line
        for line in text.splitlines()
        if not re.search(r"a step with a batch of|times as fast|ms more|ms masks|\d\.\d\dx", line)
    ]


SHARES = {"sparse": 0.99, "pays": 0.0}


def test_a_slow_down_says_where_the_time_goes() -> None:
    times = {"dense": 10e-3, "rewritten": 12e-3, "masked": 15e-3, "sparse": 20e-3, "pays": 10e-3}
    first, second, third, fourth = described(times, SHARES, 8).splitlines()
    assert first.startswith("a step with a batch of 128: dense 10.0 ms, sparse 20.0 ms, pays 10.0 ms")
    assert second.startswith("0.50 (99%) and 1.00 (0%) times as fast as dense")
    assert third == "of the 10.0 ms more, 2.0 ms are Python around 8 layers (0.25 each),"
    assert fourth.startswith("3.0 ms masks and 5.0 ms pruned gradients")


def test_a_speed_up_has_nothing_to_explain() -> None:
    times = {"dense": 10e-3, "rewritten": 12e-3, "masked": 9e-3, "sparse": 8e-3, "pays": 8e-3}
    assert len(described(times, SHARES, 8).splitlines()) == 2


@pytest.mark.parametrize("rewritten", [40e-3, 146e-3])
def test_disturbed_steps_are_not_divided(rewritten: float) -> None:
    times = {"dense": 53e-3, "rewritten": rewritten, "masked": 31e-3, "sparse": 57e-3, "pays": 70e-3}
    assert described(times, SHARES, 8).splitlines()[2:] == [
        "where the 4.0 ms more go is not known: other programs disturbed the steps"
    ]
