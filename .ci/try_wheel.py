"""Train, verify and export with an installed wheel: python -I .ci/try_wheel.py native (or pure)"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import nmcompile
from nmcompile.native import MISSING

ROOT = Path(__file__).parents[1]


def main(kind: str) -> None:
    if Path(nmcompile.__file__).is_relative_to(ROOT):
        raise SystemExit(f"{nmcompile.__file__} is the checkout, not the wheel")
    if bool(MISSING) != (kind == "pure"):
        raise SystemExit(f"a {kind} wheel, but native kernels are {MISSING or 'there'}")
    torch.manual_seed(0)
    x, model = torch.randn(64, 64), nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    sparse = nmcompile.compile(model, mode="training", args=(x,), config=nmcompile.CompileConfig(ends="sparse"))
    optimizer = torch.optim.AdamW(sparse.parameters(), 3e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (sparse(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if not losses[-1] < losses[0]:
        raise SystemExit(f"the loss went from {losses[0]} to {losses[-1]}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        exported = nmcompile.export(sparse.eval(), file, args=(x,))
        checks = nmcompile.verify(sparse), nmcompile.verify(nmcompile.finalize(sparse)), nmcompile.verify(file)
    if not all(check.ok for check in checks):
        raise SystemExit("\n".join(map(str, (exported, *checks))))
    print(
        f"{kind}, Python {sys.version.split()[0]}, torch {torch.__version__}: loss {losses[0]:.2f} to {losses[-1]:.2f}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
