"""Ten lines that train a network with sparse GEMMs; the fourth is nmcompile's."""

import torch
from torch import nn

import nmcompile

torch.manual_seed(0)
x, target = torch.randn(512, 64), torch.randn(512, 64).cumsum(1)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
model = nmcompile.compile(model, mode="training", args=(x,))
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
for step in range(101):
    loss = nn.functional.mse_loss(model(x), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
print(nmcompile.verify(nmcompile.finalize(model)))
