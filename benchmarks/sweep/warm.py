"""Importing this runs what torch does once a process, so that the processes forked from it need not.

There is no backward pass and no session of ONNX Runtime in it: their threads would not survive a fork.
"""

import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

import benchmarks.sweep.run_all  # noqa: F401 - the libraries
import nmcompile


def warm_up() -> None:
    """Compile, calibrate and export a small model."""
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval(), torch.randn(2, 8)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        compiled = nmcompile.compile(model, "inference", args=(x,), calibration=[x]).eval()
        nmcompile.export(compiled, Path(folder, "model.onnx"), (x,), verify=False)


warm_up()
