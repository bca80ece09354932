"""A training step of the demo's ResNet, batch 128, dense and sparse in turns, and what each stage of rewriting adds.

"rewritten" runs three graphs without pruning, "masked" masks the weights too, "sparse" is mode "training", and "pays"
prunes only where that pays.

python benchmarks/demo_step.py   # writes results/demo_step.json; takes half a minute
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from timing import cpu_setting
from torch.nn import functional as F

import nmcompile
from nmcompile.backends.shared.timing import Turns
from nmcompile.demo.images import digits, load_images
from nmcompile.demo.resnet import ResNet
from nmcompile.demo.steps import described, measured
from nmcompile.demo.training import BATCH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--data", type=Path, help="an IDX folder; otherwise as the demo chooses")
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits, 8 x 8")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "demo_step.json")
    options = parser.parse_args()
    images = digits() if options.digits else load_images(options.data)
    torch.manual_seed(0)
    dense = ResNet(images.train_images.shape[-1], 10)
    sparse = nmcompile.compile(copy.deepcopy(dense), "training", args=(images.train_images[:BATCH],))
    F.cross_entropy(sparse(images.train_images[:BATCH]), images.train_labels[:BATCH]).backward()
    found = measured(dense, sparse, images, Turns(options.turns, options.turns, 0.0))
    print(images.name, described(*found), sep="\n")
    speedup = {name: found.times["dense"] / time for name, time in found.times.items()}
    setting = {"command": sys.argv, **cpu_setting(), "data": images.name, "turns": options.turns}
    options.out.write_text(json.dumps({**setting, **found._asdict(), "speedup": speedup}, indent=2) + "\n")


if __name__ == "__main__":
    main()
