"""The figures of docs/many_gpus.md on the cost of masks at 70 billion parameters, from meta tensors."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import nmcompile

PAGE = (Path(__file__).parents[2] / "docs" / "many_gpus.md").read_text()
LAYERS = 80
COPIES, BANDWIDTH = 3.0, 4e12  # of a transposable mask on an H200, docs/benchmarks.md; bytes a second
DISCOUNT = (1 + 2) + 4 + 4 + (2 + 2 + 2)  # bytes: the mask as factors, two in-place products, the product
WRITTEN = 2  # bytes: the new mask, read and written


def sparse_state(layers: int) -> dict[str, Tensor]:
    """Return the sparse state of the first layers of a Llama of 70 billion parameters."""
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    return nmcompile.sparse_state_dict(nmcompile.compile(model, "training", inplace=True))


@pytest.fixture(scope="module")
def masks() -> dict[str, Tensor]:
    return sparse_state(1)


def masked(state: dict[str, Tensor]) -> int:
    """Return the bytes of the masks, which is the number of pruned weights."""
    return sum(tensor.nbytes for name, tensor in state.items() if name.endswith(".mask"))


def test_masks_take_one_byte_a_weight_and_grow_with_the_layers(masks: dict[str, Tensor]) -> None:
    width, between, kv = 8192, 28672, 1024
    assert masked(masks) == 2 * width * width + 2 * width * kv + 3 * width * between
    assert f"| 1 byte | {LAYERS * masked(masks) / 1e9:.0f} GB |" in PAGE


def test_everything_else_is_small(masks: dict[str, Tensor]) -> None:
    others = sum(tensor.nbytes for name, tensor in masks.items() if not name.endswith(".mask"))
    assert LAYERS * others < 16_000 and "under 16 kB" in PAGE


def test_the_time_of_a_rebuild_is_computed_as_the_page_says(masks: dict[str, Tensor]) -> None:
    moved = COPIES * 2 * 2 + DISCOUNT + WRITTEN
    found = re.search(r"\| (\d+) bytes moved, at 4 TB/s \| ([\d.]+) s \|", PAGE)
    assert found is not None
    assert int(found[1]) == moved
    assert float(found[2]) == round(moved * LAYERS * masked(masks) / BANDWIDTH, 2)
