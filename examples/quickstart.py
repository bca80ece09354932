"""Train a small CNN on scikit-learn's digits with sparse forward, backward and update GEMMs; export it in 4 bits."""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch import nn

import nmcompile

torch.manual_seed(0)
pixels, digits = load_digits(return_X_y=True)
images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
labels = torch.tensor(digits)

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
    nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
)  # fmt: skip

sparse = nmcompile.compile(model, mode="training")
optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
for _ in range(10):
    for batch in torch.randperm(1500).split(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(sparse(images[batch]), labels[batch]).backward()
        optimizer.step()

accuracy = (sparse(images[1500:]).argmax(1) == labels[1500:]).float().mean()
print(f"test accuracy {accuracy:.1%}\n")
print(nmcompile.inspect(sparse), "\n")
print(nmcompile.verify(nmcompile.finalize(sparse)), "\n")

small = nmcompile.compile(sparse, mode="inference", args=(images[:2],), calibration=images[:500].split(100)).eval()
with tempfile.TemporaryDirectory() as folder:
    print(nmcompile.export(small, f"{folder}/model.onnx", args=(images[:2],)))
accuracy = (small(images[1500:]).argmax(1) == labels[1500:]).float().mean()
print(f"\n4-bit test accuracy {accuracy:.1%}")
