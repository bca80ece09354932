"""Train with Lightning: two callbacks save the sparse state and watch the masks.

python examples/train_lightning.py --epochs 10
"""

import argparse
import tempfile
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import nmcompile
from nmcompile.training import MonitorTraining, SparseTraining


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


class Digits(lightning.LightningModule):
    """A classifier of 8 × 8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nmcompile.compile(network(), mode="training", args=(torch.zeros(1, 64),))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.network(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def main(epochs: int, folder: Path) -> None:
    lightning.seed_everything(0, verbose=False)
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    train = DataLoader(TensorDataset(images[:1500], labels[:1500]), 100, shuffle=True)
    test = DataLoader(TensorDataset(images[1500:], labels[1500:]), 297)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        logger=CSVLogger(folder),
        callbacks=[SparseTraining(), MonitorTraining(), ModelCheckpoint(folder)],
        accelerator="auto", devices=1, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=5,
    )  # fmt: skip
    trainer.fit(Digits(), train, test)
    print(f"accuracy {trainer.callback_metrics['accuracy']:.1%}")

    plain = nn.ModuleDict({"network": network()})  # needs nmcompile no more
    plain.load_state_dict(load_file(folder / "finalized" / "model.safetensors"))
    print(nmcompile.verify(plain["network"][2], pattern="2:4"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    with tempfile.TemporaryDirectory() as temporary:
        main(parser.parse_args().epochs, Path(temporary))
