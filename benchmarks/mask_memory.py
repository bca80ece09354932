"""The memory that masks from calibration data take beside a model's own weights, by the number of its layers.

Random Llama models are saved, read as files that are mapped into memory, and pruned, each in a process of its own.
Pages of mapped files are the system's to drop, so the peak is that of the other memory (RssAnon).

    python benchmarks/mask_memory.py --layers 4 12   # prints a table
"""

import argparse
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
import vision as vision  # before transformers, which imports torchvision
from safetensors.torch import load_file, save_file
from tabulate import tabulate
from transformers import LlamaConfig, LlamaForCausalLM

import nmcompile
from nmcompile import CompileConfig

STATUS = Path("/proc/self/status")
TOKENS, VOCABULARY = 128, 1000
PERIOD = 0.01  # seconds between looks


def model_of(layers: int, width: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 8, "vocab_size": VOCABULARY}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=True, **sizes)).eval()


def read(layers: int, width: int, path: Path) -> LlamaForCausalLM:
    """Return a model whose weights stay in a file until they are used."""
    with torch.device("meta"):
        model = model_of(layers, width)
    model.load_state_dict(load_file(path), strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


class Peak:
    """The largest anonymous memory while this context is open, over that at its start, in bytes."""

    def __enter__(self) -> "Peak":
        self.start = self.most = anonymous()
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def _look(self) -> None:
        while not self.is_over.wait(PERIOD):
            self.most = max(self.most, anonymous())

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        self.thread.join()


def anonymous() -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(layers: int, width: int, folder: Path) -> None:
    """Prune one model, and print the bytes of its weights and the peak."""
    save_file({name: tensor.clone() for name, tensor in model_of(layers, width).state_dict().items()}, folder / "model")
    model = read(layers, width, folder / "model")
    batches = [{"input_ids": torch.randint(VOCABULARY, (2, TOKENS)), "use_cache": False} for _ in range(4)]
    config = CompileConfig(masks="sparsegpt")
    with Peak() as peak:
        nmcompile.compile(model, "weights", config=config, calibration=batches, checkpoint=folder / "parts")
    print(sum(parameter.nbytes for parameter in model.parameters()), peak.most - peak.start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--one", type=Path, help="measure one model, in this folder")
    options = parser.parse_args()
    if options.one:
        measure(options.layers[0], options.width, options.one)
        return
    rows = []
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                __file__,
                "--one",
                folder,
                "--layers",
                str(layers),
                "--width",
                str(options.width),
            ]
            weights, most = map(int, subprocess.check_output(command, text=True).split())
            rows.append([layers, weights / 2**20, most / 2**20])
    print(tabulate(rows, headers=["layers", "weights, MiB", "peak beside them, MiB"], floatfmt=".0f"))


if __name__ == "__main__":
    main()
