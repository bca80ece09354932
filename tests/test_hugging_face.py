"""Hugging Face's own tools on compiled models: the Trainer's options, generate, Accelerate, PEFT, torch.compile."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import nmcompile
from nmcompile import CompileConfig
from nmcompile.api.torch_backend import torch_backend
from nmcompile.training import SparseTraining
from nmcompile.training.find_masks import masks_of

STEPS = 4
CONFIG = CompileConfig(refresh=2)
# Warnings of the libraries: hints about hardware and folders, and deprecations in torch and in each other.
pytestmark = pytest.mark.filterwarnings("ignore:(?!.*mask)")


def llama(layers: int = 2) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def texts(seed: int = 0) -> list[dict[str, Tensor]]:
    words = torch.randint(3, 32, (16, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in words]


PROMPT = torch.stack([row["input_ids"] for row in texts(1)[:2]])


def sparse_llama() -> Any:
    return nmcompile.compile(llama(), "training", config=CONFIG, inplace=True)


def fine_tune(model: nn.Module, folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, save_steps=STEPS, logging_steps=1, per_device_train_batch_size=4,
        learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    callbacks: list[Any] = [SparseTraining()] if nmcompile.is_compiled(model) else []
    trainer = Trainer(model, arguments, train_dataset=texts(), callbacks=callbacks)
    trainer.train()
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


OPTIONS: dict[str, dict[str, Any]] = {
    "bf16, accumulation": {"bf16": True, "gradient_accumulation_steps": 2},
    "checkpointing, adafactor": {"gradient_checkpointing": True, "optim": "adafactor", "max_grad_norm": 0.5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_trainers_options(name: str, tmp_path: Path) -> None:
    """A dense compilation trains as the model does; masks count steps; the finalized model generates the same."""
    options = OPTIONS[name]
    plain = losses(fine_tune(llama(), tmp_path / "plain", **options))
    dense = losses(fine_tune(nmcompile.compile(llama(), "dense", inplace=True), tmp_path / "dense", **options))
    assert plain == dense and len(plain) == STEPS
    model = sparse_llama()
    assert losses(fine_tune(model, tmp_path, **options)) != plain
    assert {mask.steps for mask in masks_of(model).values()} == {STEPS}
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "finalized").eval()
    assert nmcompile.verify(model).ok and nmcompile.verify(saved, nmcompile.NMPattern(2, 4)).checks
    for choice in ({"do_sample": False}, {"num_beams": 2}):
        words = model.eval().generate(PROMPT, max_new_tokens=6, **choice)
        assert torch.equal(words, saved.generate(PROMPT, max_new_tokens=6, **choice))


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Forget the precision that a Trainer has set for the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_accelerate_in_bfloat16() -> None:
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = sparse_llama()
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-2))
    batch = torch.stack([row["input_ids"] for row in texts()[:4]])
    for _ in range(STEPS):
        loss = prepared(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert {mask.steps for mask in masks_of(model).values()} == {STEPS}
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    final = nmcompile.finalize(unwrapped)
    assert nmcompile.verify(final).ok
    assert torch.equal(final.eval()(PROMPT).logits, unwrapped.eval()(PROMPT).logits)


def test_lora_on_a_compiled_model(tmp_path: Path) -> None:
    """The base keeps its masks, the adapter is dense; it is saved alone, and merges into the finalized model."""
    base = nmcompile.compile(llama(), "weights", config=CONFIG, inplace=True)
    masks = {name: mask.tensor.clone() for name, mask in masks_of(base).items()}
    lora = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora)
    fine_tune(model, tmp_path)
    with torch.no_grad():
        expected = model.eval()(PROMPT).logits
        assert nmcompile.verify(model).ok and (base.eval()(PROMPT).logits - expected).norm() == 0
    assert all(torch.equal(mask.tensor, masks[name]) for name, mask in masks_of(model).items() if mask.steps)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    fresh = nmcompile.compile(llama(), "weights", config=CONFIG, inplace=True)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(PROMPT).logits.detach(), expected)
    merged: Any = nmcompile.finalize(model).merge_and_unload()  # type: ignore[operator]
    torch.testing.assert_close(merged(PROMPT).logits.detach(), expected)


def test_the_trainer_runs_a_model_with_the_backend_of_torch_compile(tmp_path: Path) -> None:
    """Accelerate knows backends of its own list only, so the model is compiled before."""
    model, options = llama(1), dict[str, Any](mode="t-weights", then="eager")
    model.compile(backend=torch_backend, options=options)
    seen = losses(fine_tune(model, tmp_path))
    reference = nmcompile.compile(llama(1), "t-weights", inplace=True)
    assert seen == losses(fine_tune(reference, tmp_path))
    final = nmcompile.finalize(model)
    assert nmcompile.verify(final).ok
    expected = nmcompile.finalize(reference).eval()(PROMPT).logits
    torch.testing.assert_close(final.eval()(PROMPT).logits, expected)  # other graphs sum gradients in another order
