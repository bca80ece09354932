"""The rules that hold for every operator."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nmcompile.errors import ConfigError, OperandError
from nmcompile.pruning import OPERATORS, NMPattern, check, draw_key, greedy
from nmcompile.pruning.operator import BlockOperator
from nmcompile.pruning.philox import uniforms

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
RANDOM = sorted(name for name, operator in OPERATORS.items() if operator.needs_key)
EXACT = sorted(set(OPERATORS) - set(RANDOM))
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "sliced": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
    "expanded": lambda x: x[:, :, :1].expand(x.shape),
}


def pattern_of(name: str) -> str:
    return "1:2" if name == "mvue_one_of_two" else "2:4"


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(name: str, x: Tensor, dim: int = -1, seed: int = 0, pattern: str | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return OPERATORS[name](x, pattern or pattern_of(name), dim=dim, generator=generator)


def counts(x: Tensor, block: int, dim: int = -1) -> Tensor:
    """Count the non-zeros of every block."""
    pieces = torch.split(x != 0, block, dim)
    return torch.stack([piece.sum(dim) for piece in pieces])


def test_names_and_flags() -> None:
    assert all(operator.name == name for name, operator in OPERATORS.items())
    assert {name for name, operator in OPERATORS.items() if operator.unbiased} == {
        "mvue",
        "mvue_one_of_two",
        "mvue_pairs",
        "mvue_approx",
        "unbiased",
    }
    assert EXACT == ["greedy", "greedy_by_value", "sdgp"]
    with pytest.raises(TypeError):
        OPERATORS["other"] = greedy  # type: ignore[index]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -4])
@pytest.mark.parametrize("name", OPERATORS)
def test_result_depends_on_values_not_on_strides(name: str, dim: int, layout: str) -> None:
    x = LAYOUTS[layout](noise(4, 8, 6, 4))
    before = x.clone()
    pruned = run(name, x, dim)
    assert x.equal(before)
    assert pruned.shape == x.shape and pruned.device == x.device
    assert pruned.stride() == torch.empty_like(x).stride()
    assert pruned.equal(run(name, x.contiguous(), dim))
    assert (counts(pruned, 2 if name == "mvue_one_of_two" else 4, dim) <= 2).all()
    assert pruned.count_nonzero() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    x = noise(32, 16, dtype=dtype)
    pruned = run(name, x)
    assert pruned.dtype == dtype
    wide = run(name, x.to(torch.promote_types(dtype, torch.float32)))
    assert pruned.equal(wide.to(dtype))


@pytest.mark.parametrize("name", ["greedy", "mvue", "mvue_pairs", "mvue_approx", "biased"])
def test_float64_is_not_rounded(name: str) -> None:
    x = torch.tensor([1.0, 1 + 1e-12, 1 + 2e-12, 1 + 3e-12], dtype=torch.float64)
    pruned = run(name, x)
    if name in ("greedy", "biased"):
        assert ((pruned == 0) | (pruned == x)).all() and pruned[3] == (x[3] if name == "greedy" else pruned[3])
    else:
        torch.testing.assert_close(pruned[pruned != 0], (x.sum() / 2).expand(2), rtol=0.3e-12, atol=0)


@pytest.mark.parametrize("name", RANDOM)
def test_blocks_draw_by_their_index_in_c_order(name: str) -> None:
    operator, pattern = OPERATORS[name], NMPattern.parse(pattern_of(name))
    assert isinstance(operator, BlockOperator)
    x, key = noise(3, 10, 5), draw_key(torch.Generator().manual_seed(5))
    per_line = -(-10 // pattern.block)
    u = uniforms(key, 3 * per_line * 5, operator.draws)
    expected = torch.zeros_like(x)
    b = 0
    for i in range(3):
        for piece in range(per_line):
            for k in range(5):
                place = slice(piece * pattern.block, (piece + 1) * pattern.block)
                block = torch.zeros(pattern.block)
                block[: len(x[i, place, k])] = x[i, place, k]
                kept, values = operator.select(block[:, None], pattern, u[:, b : b + 1])
                chosen = torch.where(kept, block[:, None] if values is None else values, 0.0)[:, 0]
                expected[i, place, k] = chosen[: len(x[i, place, k])]
                b += 1
    assert operator.prune(x, pattern, 1, key).equal(expected)


@pytest.mark.parametrize("name", RANDOM)
def test_one_key_a_call_from_the_generator(name: str) -> None:
    x = noise(64, 16)
    assert run(name, x, seed=1).equal(run(name, x, seed=1))
    assert not run(name, x, seed=1).equal(run(name, x, seed=2))
    called, drawn = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    first = OPERATORS[name](x, pattern_of(name), generator=called)
    assert first.equal(OPERATORS[name].prune(x, pattern_of(name), -1, draw_key(drawn)))
    assert called.get_state().equal(drawn.get_state())
    torch.manual_seed(7)
    assert OPERATORS[name](x, pattern_of(name)).equal(first)


@pytest.mark.parametrize("name", EXACT)
def test_deterministic_operators_draw_nothing(name: str) -> None:
    state = torch.get_rng_state()
    OPERATORS[name](noise(4, 4), "2:4")
    assert torch.get_rng_state().equal(state)
    assert OPERATORS[name].prune(noise(4, 4), "2:4", -1, None).equal(run(name, noise(4, 4)))


@pytest.mark.parametrize("name", OPERATORS)
def test_out_is_written_and_returned(name: str) -> None:
    x = noise(8, 16)
    out = torch.full((16, 8), torch.nan).t()
    assert OPERATORS[name](x, pattern_of(name), generator=torch.Generator().manual_seed(0), out=out) is out
    assert out.equal(run(name, x))
    same = x.clone()
    OPERATORS[name](same, pattern_of(name), generator=torch.Generator().manual_seed(0), out=same)
    assert same.equal(out)


@pytest.mark.parametrize(
    "out", [torch.empty(8, 4), torch.empty(4, 8, dtype=torch.float64), torch.empty(4, 8, device="meta")]
)
def test_out_must_fit(out: Tensor) -> None:
    with pytest.raises(OperandError, match=r"out is .*empty_like"):
        greedy(noise(4, 8), "2:4", out=out)


@pytest.mark.parametrize("name", OPERATORS)
def test_zero_blocks_stay_zero(name: str) -> None:
    x = torch.zeros(50, 8)
    x[::2, :4] = 1.0
    pruned = run(name, x)
    assert pruned[x == 0].equal(torch.zeros(50 * 8 - 25 * 4))
    assert not torch.signbit(pruned[x == 0]).any()


@pytest.mark.parametrize("name", [n for n in OPERATORS if n.startswith("mvue") or n in ("greedy", "biased")])
def test_sparse_enough_blocks_are_unchanged(name: str) -> None:
    n_keep, block = NMPattern.parse(pattern_of(name)).n_keep, NMPattern.parse(pattern_of(name)).block
    x = noise(500, block) * 10.0 ** torch.linspace(-30, 30, 500).unsqueeze(1)
    positions = torch.rand(500, block, generator=torch.Generator().manual_seed(1)).argsort(1)
    x = torch.where(positions < n_keep, x, 0.0)
    assert run(name, x).equal(x)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 9])
def test_partial_blocks_keep_at_most_n(name: str, length: int) -> None:
    pattern = NMPattern.parse(pattern_of(name))
    x = noise(200, length).abs() + 1
    pruned = run(name, x)
    assert (counts(pruned, pattern.block) <= pattern.n_keep).all()
    padded = torch.nn.functional.pad(x, (0, -length % pattern.block))
    torch.testing.assert_close(pruned, run(name, padded)[:, :length], rtol=1e-6 if name == "sdgp" else 0, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_non_finite_blocks_stay_non_finite(name: str, dtype: torch.dtype, value: float) -> None:
    pattern = NMPattern.parse(pattern_of(name))
    x = noise(40, 2 * pattern.block, dtype=dtype)
    x[torch.arange(40), torch.arange(40) % pattern.block] = value
    pruned = run(name, x)
    assert (~pruned[:, : pattern.block].isfinite()).any(1).all()
    assert (counts(pruned, pattern.block) <= pattern.n_keep).all()
    if name != "sdgp":  # its scale is one per row
        first = pruned[:, : pattern.block]
        assert ((first == 0) | (first == x[:, : pattern.block]) | first.isnan() & x[:, : pattern.block].isnan()).all()
        assert pruned[:, pattern.block :].isfinite().all()


@pytest.mark.parametrize("name", OPERATORS)
def test_more_non_finite_elements_than_n(name: str) -> None:
    x = torch.full((16, 4), torch.inf)
    assert (counts(run(name, x), 4) <= 2).all()
    assert (~run(name, x).isfinite()).any(1).all()


@pytest.mark.parametrize("name", OPERATORS)
def test_sums_that_overflow_keep_at_most_n(name: str) -> None:
    pattern = NMPattern.parse(pattern_of(name))
    x = torch.full((16, pattern.block), 3e38)
    assert (counts(run(name, x), pattern.block) == pattern.n_keep).all()


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 4)])
@pytest.mark.parametrize("name", OPERATORS)
def test_empty_tensors(name: str, shape: tuple[int, ...]) -> None:
    for dim in range(len(shape)):
        assert run(name, torch.empty(shape), dim).shape == shape
    assert OPERATORS["greedy"].mask(torch.empty(shape), "2:4").shape == shape


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8])
@pytest.mark.parametrize("name", OPERATORS)
def test_other_dtypes_are_refused(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(OperandError, match=rf"{dtype}.*\(4, 8\).*convert"):
        run(name, torch.zeros(4, 8, dtype=dtype))


def test_other_layouts_and_dims_are_refused() -> None:
    with pytest.raises(OperandError, match="to_dense"):
        greedy(torch.eye(4).to_sparse(), "2:4")
    with pytest.raises(OperandError, match=r"dim 2 .*\(4, 8\)"):
        greedy(noise(4, 8), "2:4", dim=2)
    with pytest.raises(OperandError, match=r"dim -1 .*\(\)"):
        greedy(torch.tensor(1.0), "2:4")
    assert check(noise(4, 8), -2) == 0


def test_errors_leave_the_generator_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    for x, pattern, out in [
        (torch.zeros(4, dtype=torch.int64), "2:4", None),
        (torch.zeros(4), "4:2", None),
        (torch.zeros(4), "2:4", torch.zeros(5)),
    ]:
        with pytest.raises((OperandError, ConfigError)):
            OPERATORS["mvue"](x, pattern, generator=generator, out=out)
    assert generator.get_state().equal(state)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("mvue_one_of_two", "2:4"), ("mvue_pairs", "1:2"), ("mvue_pairs", "2:8"), ("mvue_approx", "1:4")],
)
def test_a_pattern_that_does_not_fit_names_the_general_operator(name: str, pattern: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}.*takes \d:.*not {pattern}.*'mvue'"):
        OPERATORS[name](noise(4, 8), pattern)
    with pytest.raises(ConfigError):
        OPERATORS[name].prune(noise(4, 8), pattern, -1, torch.tensor(0))


@pytest.mark.parametrize("key", [None, torch.zeros(2, dtype=torch.int64), torch.tensor(0.5)])
def test_a_key_that_does_not_fit(key: Tensor | None) -> None:
    with pytest.raises(OperandError, match="draw_key"):
        OPERATORS["mvue"].prune(noise(4, 8), "2:4", -1, key)


@pytest.mark.parametrize("name", RANDOM)
def test_random_operators_have_no_mask(name: str) -> None:
    with pytest.raises(ConfigError, match="greedy"):
        OPERATORS[name].mask(noise(4, 8), "2:4")


@pytest.mark.parametrize("name", OPERATORS)
def test_parameters_have_no_history_in_the_result(name: str) -> None:
    weight = torch.nn.Parameter(noise(8, 8))
    pruned = run(name, weight)
    assert not pruned.requires_grad and type(pruned) is Tensor
    assert pruned.equal(run(name, weight.detach()))


@pytest.mark.parametrize("name", RANDOM)
def test_scaling_by_a_power_of_two_scales_the_result(name: str) -> None:
    x = noise(64, 16)
    assert run(name, x * 2.0**30).equal(run(name, x) * 2.0**30)
    assert run(name, -x).equal(-run(name, x))


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_values(name: str) -> None:
    assert copy.deepcopy(OPERATORS[name]) == OPERATORS[name]
    assert pickle.loads(pickle.dumps(OPERATORS[name])) == OPERATORS[name]
