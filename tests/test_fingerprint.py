"""The fingerprint of a tensor differs after any write to it, and only then."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nmcompile import fingerprint as module
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.fingerprint import fingerprint
from nmcompile.native import kernels

SHAPES = [(0,), (3,), (5, 7), (64, 48), (33, 130), (70, 64, 3, 3)]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1),
    "a part": lambda x: x[1:],
    "with gaps": lambda x: x[..., ::2],
    "expanded": lambda x: x.expand(2, *x.shape),
}


def by_definition(x: Tensor) -> int:
    """Compute the fingerprint of a contiguous tensor, word by word."""

    def mixed(n: int) -> int:
        n = n * 0x9E3779B97F4A7C15 % 2**64
        n = (n ^ n >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        n = (n ^ n >> 27) * 0x94D049BB133111EB % 2**64
        return n ^ n >> 31

    data = x.flatten().view(torch.uint8).numpy().tobytes()
    total = mixed(len(data))
    for row, start in enumerate(range(0, len(data), 4096), 1):
        part = data[start : start + 4096].ljust(4096, b"\0")
        words = (int.from_bytes(part[i : i + 4], "little") for i in range(0, 4096, 4))
        total += mixed((sum((mixed(j) >> 33) * word for j, word in enumerate(words, 1)) + mixed(row)) % 2**64)
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
def test_it_is_what_its_definition_says(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds for the native kernel, if there is one, and for torch's operators."""
    for shape in SHAPES:
        x = torch.randn(shape).to(dtype)
        for read in LAYOUTS.values():
            view = read(x)
            native = fingerprint(view)
            with monkeypatch.context() as patch:
                patch.setattr(module, "MISSING", "no compiler")
                assert fingerprint(view) == native
        assert fingerprint(x) == by_definition(x)


@pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason)
def test_threads_compute_the_same() -> None:
    x = torch.randn(300, 1000)
    assert len({kernels.fingerprint(x.data_ptr(), x.nbytes, threads) for threads in (1, 2, 3, 7)}) == 1


def one_element(x: Tensor) -> None:
    x[-1, -1] += 1


def the_sign_of_a_zero(x: Tensor) -> None:
    x[0, 0] = -0.0


def two_elements_change_places(x: Tensor) -> None:
    x[3, 1], x[7, 5] = x[7, 5].clone(), x[3, 1].clone()


def rows_change_places(x: Tensor) -> None:
    x.copy_(x.flip(0))


def columns_change_places(x: Tensor) -> None:
    x.copy_(x.roll(4, 1))


def two_signs(x: Tensor) -> None:
    """Swap the first two elements in each of two rows, which leaves both sums of the words unchanged."""
    x[0, :2], x[1, :2] = x[0, :2].flip(0), x[1, :2].flip(0)


WRITES = [
    one_element, the_sign_of_a_zero, two_elements_change_places, rows_change_places, columns_change_places, two_signs,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("coarse", [False, True])
def test_a_write_shows(write: Callable[[Tensor], None], coarse: bool) -> None:
    """Also for tensors with few distinct values, which few bits tell apart."""
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    x = x.sign() if coarse else x
    x[0, 0], x[0, 1], x[1, :2], x[3, 1], x[7, 5] = 0.0, 1.0, torch.tensor([1.0, 0.0]), 1.0, -1.0
    before = fingerprint(x)
    write(x.data)
    assert fingerprint(x) != before


def test_a_write_beside_it_does_not_show() -> None:
    base = torch.randn(16, 16)
    parts = [base[:, ::2], base[:4], base[:, :8]]
    before = [fingerprint(part) for part in parts]
    base[4:, 9::2] = 0
    assert [fingerprint(part) for part in parts] == before


def test_the_same_bytes_in_another_layout_differ() -> None:
    x = torch.randn(8, 8)
    assert fingerprint(x) != fingerprint(x.t()) and fingerprint(x) == fingerprint(x.clone())


class Subclass(Tensor):
    pass


def test_what_cannot_be_read_has_none() -> None:
    assert fingerprint(torch.empty(3, device="meta")) is None
    assert fingerprint(torch.zeros(3).as_subclass(Subclass)) is None
    found: list[int | None] = []

    def total(x: Tensor) -> Tensor:
        found.append(fingerprint(x))
        return x.sum()

    torch.func.grad(total)(torch.ones(3))
    assert found == [None]


def test_a_parameter_is_read_in_every_mode() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    expected = fingerprint(weight.detach())
    with torch.inference_mode():
        assert fingerprint(weight) == expected
    with torch.device("meta"):
        assert fingerprint(weight) == expected
