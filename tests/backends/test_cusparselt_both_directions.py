"""One pass of the forward GEMM compresses a weight in both directions, and the backward GEMM takes the second form.

The kernel runs in Triton's interpreter, on a library that PyTorch computes.
"""

import gc
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.backends.cusparselt import CusparseltBackend
from nmcompile.backends.cusparselt import both_directions as both
from nmcompile.backends.cusparselt.both_directions import both_directions, compress_both
from nmcompile.backends.cusparselt.operand import Operand, compressed
from nmcompile.backends.shared import choose_kernel as choices
from nmcompile.ir.choice import Choice
from nmcompile.ir.protocols import Backend
from nmcompile.pruning import transposable_mask
from tests.backends.fake_cusparselt import Compress, FakeLibrary
from tests.backends.test_cusparselt_layout import groups_share_bytes, kernel, rows_share_bytes

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
__all__ = ["kernel"]


@pytest.mark.parametrize("order", [rows_share_bytes, groups_share_bytes])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    ("shape", "dtype", "is_transposed"),
    [((64, 128), torch.bfloat16, False), ((100, 72), torch.float16, True), ((64, 64), torch.float32, False)],
)
def test_both_forms_equal_those_made_alone(
    shape: tuple[int, int], dtype: torch.dtype, is_transposed: bool, dim: int, order: Compress, kernel: None
) -> None:
    library, weight = FakeLibrary(order), torch.randn(shape, dtype=dtype)
    weight[3, 5], weight[8] = -0.0, 0.0
    mask = transposable_mask(weight, "2:4")
    if is_transposed:
        weight, mask = weight.t(), mask.t()
    own, other = Operand(weight, dim, mask), Operand(weight, 1 - dim, mask)
    sizes = [(-(-operand.rows // 64) * 64, -(-operand.depth // 64) * 64) for operand in (own, other)]
    forms = compress_both(library, own, *sizes)
    assert forms is not None
    for form, operand, size in zip(forms, (own, other), sizes, strict=True):
        assert form.equal(compressed(library, operand, *size))


@pytest.fixture
def library(kernel: None, monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    """Return a library whose kernels run whatever they gain."""
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice("sparse", "the test asks for it"))
    return FakeLibrary()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the passes over a weight: of both directions, and of one."""
    found: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            found[name] += 1
            return function(*arguments)

        return call

    monkeypatch.setattr(f"{both.__name__}.compress_both", counted("both", compress_both))
    monkeypatch.setattr(f"{both.__name__}.compressed", counted("one", compressed))
    return found


def layer(backend: Backend | str) -> nn.Module:
    return nmcompile.compile(nn.Linear(64, 128), "t-weights", config=CompileConfig(ends="sparse"), backend=backend)


def trained(library: FakeLibrary) -> nn.Module:
    return layer(CusparseltBackend(library))


def step(model: nn.Module, x: Tensor) -> Tensor:
    """Return dX."""
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
    return gradient


X = torch.linspace(-1, 1, 8 * 64).view(8, 64).requires_grad_()


def test_from_the_second_step_on_one_pass_serves_both_gemms(library: FakeLibrary, passes: Counter[str]) -> None:
    model = trained(library)
    first = step(model, X)
    assert passes == {"one": 2}
    passes.clear()
    for _ in range(3):
        assert step(model, X).equal(first)
    assert passes == {"both": 3} and not both_directions(library).waiting


def test_the_form_is_of_the_weight_that_the_forward_gemm_read(library: FakeLibrary, passes: Counter[str]) -> None:
    model, reference = trained(library), layer("reference")
    reference.load_state_dict(model.state_dict())
    optimizers = [torch.optim.SGD(one.parameters(), 0.1, fused=True) for one in (model, reference)]
    for _ in range(4):
        gradients = []
        for one, optimizer in zip((model, reference), optimizers, strict=True):
            optimizer.zero_grad()
            x = X.detach().requires_grad_()
            one(x).square().mean().backward()
            gradients.append(x.grad)
            optimizer.step()
        torch.testing.assert_close(*gradients)
    assert passes["both"] == 3


def test_a_layer_called_twice_has_the_gradients_of_both_calls(library: FakeLibrary, passes: Counter[str]) -> None:
    model = trained(library)
    first = step(model, X)
    y, other = model(X), model(X)
    (gradient,) = torch.autograd.grad(y.square().sum() + other.square().sum(), X)
    torch.testing.assert_close(gradient, 2 * first)


def test_forward_gemms_without_a_backward_gemm_pack_one_direction(library: FakeLibrary, passes: Counter[str]) -> None:
    """The first of them cannot know that no backward GEMM follows."""
    directions, weight = both_directions(library), torch.randn(64, 64, dtype=torch.bfloat16)
    mask, size = transposable_mask(weight, "2:4"), (64, 64)
    forward, backward = Operand(weight, 1, mask), Operand(weight, 0, mask)
    directions.for_backward(backward, size)
    passes.clear()
    for _ in range(3):
        directions.for_forward(forward, size)
    assert passes == {"both": 1, "one": 2} and not directions.waiting
    directions.for_backward(backward, size)
    passes.clear()
    directions.for_forward(forward, size)
    assert passes == {"both": 1}


def written(weight: Tensor, mask: Tensor) -> Tensor:
    weight.mul_(2.0)
    return weight


def masked_anew(weight: Tensor, mask: Tensor) -> Tensor:
    mask.copy_(mask.flip(0))
    return weight


def copied(weight: Tensor, mask: Tensor) -> Tensor:
    return 2.0 * weight


@pytest.mark.parametrize("change", [written, masked_anew, copied])
def test_another_weight_than_that_of_the_forward_gemm_is_compressed(
    change: Callable[[Tensor, Tensor], Tensor], library: FakeLibrary
) -> None:
    directions, weight = both_directions(library), torch.randn(64, 64, dtype=torch.bfloat16)
    mask = transposable_mask(weight, "2:4")
    directions.for_backward(Operand(weight, 0, mask), (64, 64))
    directions.for_forward(Operand(weight, 1, mask), (64, 64))
    assert mask in directions.waiting
    operand = Operand(change(weight, mask), 0, mask)
    assert directions.for_backward(operand, (64, 64)).equal(compressed(library, operand, 64, 64))


def test_nothing_waits_on_a_stream_that_may_record_a_graph(library: FakeLibrary, passes: Counter[str]) -> None:
    model = trained(library)
    step(model, X)
    library.current_stream = 1
    passes.clear()
    step(model, X)
    assert passes == {"one": 2}


def test_forms_go_with_their_mask(library: FakeLibrary) -> None:
    model = trained(library)
    step(model, X)
    y = model(X)
    directions = both_directions(library)
    assert len(directions.waiting) == len(directions.asked) == 1
    del model, y
    gc.collect()
    assert len(directions.waiting) == len(directions.asked) == 0
