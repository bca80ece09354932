import pytest
import torch

from nmcompile.pruning import draw_key
from nmcompile.pruning.philox import philox4x32, uniforms

# Random123's kat_vectors for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, result: str) -> None:
    c0, c1, c2, c3, k0, k1 = map(torch.tensor, words(counter) + words(key))
    assert [int(word) for word in philox4x32(c0, c1, c2, c3, k0, k1)] == words(result)


def uniform_number(key: int, i: int) -> float:
    """Compute the definition in Python integers."""
    c = [(i >> 2) & 0xFFFFFFFF, i >> 34, 0, 0]
    k = [key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return (c[i & 3] >> 8) * 2.0**-24


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
@pytest.mark.parametrize(("count", "per_block"), [(1, 1), (7, 1), (5, 2), (8, 3)])
def test_uniforms_follow_the_definition(key: int, count: int, per_block: int) -> None:
    u = uniforms(torch.tensor(key), count, per_block)
    assert u.dtype == torch.float32
    assert u.tolist() == [[uniform_number(key, per_block * b + k) for b in range(count)] for k in range(per_block)]


def test_uniforms_are_uniform() -> None:
    u = uniforms(draw_key(torch.Generator().manual_seed(0)), 1_000_000)[0].double()
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, bins=100, min=0, max=1)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 99 + 5 * (2 * 99) ** 0.5
    assert abs(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1]) < 5e-3


def test_keys_use_all_64_bits_and_come_from_the_generator() -> None:
    first, second = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    keys = [int(draw_key(first)) for _ in range(200)]
    assert keys == [int(draw_key(second)) for _ in range(200)]
    assert len(set(keys)) == 200
    for bit in range(64):
        assert {(key >> bit) & 1 for key in keys} == {0, 1}


def test_without_a_generator_the_default_one_is_used() -> None:
    torch.manual_seed(11)
    first = draw_key()
    torch.manual_seed(11)
    assert draw_key(None, "cpu").equal(first)
    assert first.dtype == torch.int64 and first.dim() == 0
    assert not draw_key().equal(first)
