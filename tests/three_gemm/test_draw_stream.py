"""Keys are a function of seed, layer, rank and draw, and of nothing else."""

from itertools import product

import pytest
import torch
import torch.distributed as dist

from nmcompile.three_gemm.draw_stream import DrawStream


def keys(seed: int, layer: str, draws: int = 1) -> list[tuple[int, int]]:
    stream = DrawStream(seed, layer)
    pairs = [stream.next_keys().tolist() for _ in range(draws)]
    return [(backward, update) for backward, update in pairs]


def set_rank(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)


def test_seed_layer_rank_phase_and_draw_each_give_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    for rank in range(3):
        set_rank(monkeypatch, rank)
        for seed, layer in product((0, 1, -1, 2**63 - 1), ("fc", "fc.0", "conv")):
            seen += [key for pair in keys(seed, layer, 20) for key in pair]
    assert len(set(seen)) == len(seen) == 3 * 4 * 3 * 20 * 2


def test_equal_streams_draw_equal_keys_whatever_the_global_generator_says() -> None:
    torch.manual_seed(1)
    first = keys(7, "fc", 5)
    torch.manual_seed(2)
    assert keys(7, "fc", 5) == first


def test_rank_0_draws_what_a_single_process_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = keys(7, "fc")
    set_rank(monkeypatch, 0)
    assert keys(7, "fc") == alone


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1])
def test_seeds_are_64_bits_with_or_without_a_sign(seed: int) -> None:
    """A process that was not seeded has, half of the time, an `initial_seed` that int64 does not hold."""
    assert keys(seed, "fc", 3) == keys(seed - 2**64, "fc", 3)
    assert torch.tensor(DrawStream(seed, "fc").seed).dtype == torch.int64


def test_the_global_generator_is_not_advanced() -> None:
    before = torch.get_rng_state()
    keys(7, "fc", 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stream_goes_on_from_its_draw() -> None:
    all_keys, resumed = keys(7, "fc", 6), DrawStream(7, "fc")
    resumed.draw.fill_(4)
    assert [tuple(resumed.next_keys().tolist()) for _ in range(2)] == all_keys[4:]
    assert int(resumed.draw) == 6


def test_a_stream_stays_where_its_draw_has_a_value() -> None:
    stream = DrawStream(7, "fc")
    first = stream.next_keys()
    stream.move(torch.device("meta"))
    assert int(stream.draw) == 1 and not torch.equal(stream.next_keys(), first)


def test_draw_is_the_only_state() -> None:
    stream = DrawStream(7, "fc")
    before = dict(vars(stream))
    before.pop("draw")
    stream.next_keys()
    assert vars(stream) == before | {"draw": torch.tensor(1)}
    assert stream.draw.shape == () and stream.draw.dtype == torch.int64
