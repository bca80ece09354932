"""Weights that Python code multiplies by: a run of an example shows how, and then the products run as layers."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig, MixtralForCausalLM

import nmcompile
from nmcompile import CompileConfig
from nmcompile.capture import capture_model
from nmcompile.capture.watch_products import watch_products
from nmcompile.pruning import mask, transposable_mask

ALL = CompileConfig(ends="sparse")
EXPERTS, IN, OUT = 4, 8, 16
Call = Callable[["Experts", Tensor], Tensor]


class Experts(nn.Module):
    """Python code (a test on data) around a stack of matrices, (out, in) or (in, out), and a matrix."""

    def __init__(self, multiply: Call, shape: tuple[int, ...] = (EXPERTS, OUT, IN)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(OUT, IN)
        self.w, self.bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(OUT))
        self.multiply = multiply

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Multiply (batch, tokens, in), then scale.

        `scale` is the signature's.
        """
        if bool(x.isnan().any()):
            raise ValueError
        result: Tensor = self.head(self.multiply(self, x)) * scale
        return result


def in_a_loop(m: Experts, x: Tensor) -> Tensor:
    return torch.stack([F.linear(one, m.w[i % EXPERTS]) for i, one in enumerate(x)])


def by_tensor_index(m: Experts, x: Tensor) -> Tensor:
    return torch.stack([F.linear(one, m.w[torch.tensor(i % EXPERTS)], m.bias) for i, one in enumerate(x)])


def by_matmul(m: Experts, x: Tensor) -> Tensor:
    return torch.stack([one @ m.w[i % EXPERTS].T for i, one in enumerate(x)])


def by_left_matmul(m: Experts, x: Tensor) -> Tensor:
    return torch.stack([(m.w[i % EXPERTS] @ one.T).T for i, one in enumerate(x)])


def batched(m: Experts, x: Tensor) -> Tensor:
    return torch.bmm(x[:EXPERTS], m.w.transpose(1, 2))


def grouped(m: Experts, x: Tensor) -> Tensor:
    tokens = x.reshape(-1, IN)
    ends = torch.tensor([0, 5, 9, len(tokens)], dtype=torch.int32)
    return F.grouped_mm(tokens, m.w.transpose(-2, -1), offs=ends)


def by_einsum(m: Experts, x: Tensor) -> Tensor:
    return torch.einsum("bti,eoi->beto", x, m.w)


def by_einsum_of_each(m: Experts, x: Tensor) -> Tensor:
    return torch.einsum("eoi,etbi->bteo", m.w, x[:EXPERTS, :, None])


def matrix(m: Experts, x: Tensor) -> Tensor:
    return F.linear(x, m.w, m.bias)


def matrix_in_out(m: Experts, x: Tensor) -> Tensor:
    return x @ m.w + m.bias


def batched_in_out(m: Experts, x: Tensor) -> Tensor:
    return torch.matmul(x[:EXPERTS], m.w)


STACKS = (
    in_a_loop, by_tensor_index, by_matmul, by_left_matmul, batched, grouped, by_einsum, by_einsum_of_each,
)  # fmt: skip
CASES: dict[str, tuple[Call, tuple[int, ...]]] = {call.__name__: (call, (EXPERTS, OUT, IN)) for call in STACKS}
CASES |= {
    "matrix": (matrix, (OUT, IN)),
    "matrix_in_out": (matrix_in_out, (IN, OUT)),
    "batched_in_out": (batched_in_out, (EXPERTS, IN, OUT)),
}


def made(name: str) -> Experts:
    call, shape = CASES[name]
    return Experts(call, shape)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 4, IN, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the output, dX and the gradients of all parameters."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    output = model(x)
    (output.sin()).sum().backward()
    assert x.grad is not None
    return [output.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_dense_model_computes_the_same_bit_for_bit(name: str, x: Tensor) -> None:
    model = made(name)
    compiled = nmcompile.compile(model, "dense", args=(x,))
    assert {layer.name for layer in nmcompile.inspect(compiled).layers} == {"w", "head"}
    for found, expected in zip(gradients(compiled, x), gradients(model, x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", CASES)
def test_a_masked_product_is_the_product_with_the_masked_weight(name: str, x: Tensor) -> None:
    """The oracle computes each matrix's own transposable mask, and lets autograd do the rest."""
    model = made(name)
    compiled = nmcompile.compile(model, "t-weights", args=(x,), config=ALL)
    oracle = copy.deepcopy(model)
    matrices = oracle.w.detach().reshape(-1, *oracle.w.shape[-2:])
    masks = {
        oracle.w: torch.stack([transposable_mask(one, "2:4") for one in matrices]).view_as(oracle.w),
        oracle.head.weight: transposable_mask(oracle.head.weight.detach(), "2:4"),
    }
    for weight, kept in masks.items():
        weight.data *= kept
    assert_close(gradients(compiled, x), gradients(oracle, x))
    final = nmcompile.finalize(compiled)
    assert type(final) is Experts and torch.equal(final.w, oracle.w) and nmcompile.verify(compiled).ok
    assert nmcompile.verify(final).ok
    torch.testing.assert_close(final(x), compiled(x))


@pytest.mark.parametrize("name", ["batched_in_out", "by_einsum", "in_a_loop"])
def test_a_row_wise_mask_is_along_in(name: str, x: Tensor) -> None:
    model = made(name)
    final = nmcompile.finalize(nmcompile.compile(model, "weights", args=(x,), config=ALL))
    dim = 1 if name == "batched_in_out" else 2
    assert torch.equal(final.get_parameter("w") != 0, mask(model.w.detach(), "2:4", dim=dim))


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_pruned_within_each_call(name: str, x: Tensor) -> None:
    compiled = nmcompile.compile(made(name), "training", args=(x,), config=ALL)
    report = nmcompile.verify(compiled, step=lambda: gradients(compiled, x))
    assert report.ok and {check.operand for check in report.checks} == {"weight", "grad_output"}
    assert {check.name.partition(" ")[0] for check in report.checks if check.operand == "grad_output"} == {"w", "head"}


def test_pruned_gradients_of_experts_are_unbiased(x: Tensor) -> None:
    model = made("grouped")
    exact = gradients(model, x)[2:]
    compiled = nmcompile.compile(model, "gradients", args=(x,), config=ALL)
    draws = torch.stack([gradients(compiled, x)[3] for _ in range(400)])
    error = draws.mean(0) - exact[1]
    deviation = draws.std(0) / len(draws) ** 0.5
    reached = deviation > 1e-6
    assert bool((error[~reached].abs() < 1e-5).all())
    z = error[reached] / deviation[reached]
    assert int(reached.sum()) > 50 and float(z.abs().max()) < 5 and float(z.square().mean()) < 1.5


class Reads(nn.Module):
    """Code that does more with its weight than to multiply by it."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.head, self.read = nn.Parameter(torch.randn(IN, IN)), nn.Linear(IN, IN), read

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.isnan().any()):
            raise ValueError
        result: Tensor = self.head(self.read(x, self.w))
        return result


class Own(torch.autograd.Function):
    """A product whose backward is its own: no router sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return F.linear(x, w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,), (x, w) = grads, ctx.saved_tensors
        return grad @ w, grad.flatten(0, -2).T @ x.flatten(0, -2)


@torch.no_grad()
def constant(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w)


OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda x, w: F.linear(x, w) + w.sum(),
    "detach": lambda x, w: F.linear(x, w.detach()),
    "data": lambda x, w: F.linear(x, w.data),
    "half of it": lambda x, w: F.linear(x[..., :4], w[:, :4]),
    "copy": lambda x, w: F.linear(x, w.clone()),
    "both layouts": lambda x, w: F.linear(x, w) @ w,
    "gram matrix": lambda x, w: x @ (w @ w.T),
    "low rank": lambda x, w: x @ (w[:, :4] @ w[:4]),
    "cast": lambda x, w: F.linear(x, w.float()),
    "cast to the input": lambda x, w: F.linear(x, w.to(x)),
    "own backward": lambda x, w: Own.apply(x, w),
    "checkpoint": lambda x, w: checkpoint(F.linear, x, w, use_reentrant=False),
    "reentrant checkpoint": lambda x, w: checkpoint(F.linear, x, w, use_reentrant=True),
    "no gradients": lambda x, w: x + constant(x, w),
    "norm": lambda x, w: F.linear(x, F.normalize(w)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_weight_that_is_read_in_another_way_stays_python(name: str, x: Tensor) -> None:
    model = Reads(OTHERS[name])
    captured = capture_model(model, (x,))
    assert not captured.routes and captured.uncaptured[""] == ("w",)
    compiled = nmcompile.compile(model, "t-weights", args=(x,), config=ALL)
    final = nmcompile.finalize(compiled)
    assert torch.equal(final.get_parameter("w"), model.w)
    assert_close(gradients(compiled, x), gradients(final, x))


WRITES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda w: w.mul_(2),
    "data": lambda w: w.data.mul_(2),
    "a view": lambda w: w[0].mul_(2),
    "a list": lambda w: torch._foreach_mul_([w], 2),
    "out": lambda w: torch.mul(w, 2, out=w),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_run_that_writes_a_parameter_is_given_up_before_it_does(name: str, x: Tensor) -> None:
    def read(x: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            WRITES[name](w)
        return F.linear(x, w)

    model = Reads(read)
    before = model.w.detach().clone()
    watched = watch_products(model, {id(model.w): "w"}, set(), (x,), {})
    assert torch.equal(model.w, before) and not watched.has_run and not watched.products


class Merging(nn.Linear):
    """LoRA's layer in loralib, which merges in `eval()` and takes the sum apart again in `train()`."""

    is_merged = False

    def train(self, mode: bool = True) -> "Merging":
        if mode == self.is_merged:
            self.weight.data += -1.0 if mode else 1.0
            self.is_merged = not mode
        super().train(mode)
        return self


@pytest.mark.parametrize("training", [True, False])
def test_the_example_and_the_state_of_the_model_stay_as_they_are(training: bool, x: Tensor) -> None:
    class Net(Reads):
        def __init__(self) -> None:
            super().__init__(F.linear)
            self.merging = Merging(IN, IN)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.merging(x.add_(1)))

    model = Net().train(training)
    before, given = [p.clone() for p in model.parameters()], x.clone()
    watched = watch_products(model, {id(model.w): "w"}, set(), (x,), {})
    assert watched.readers("w") == [""] and torch.equal(x, given) and model.training is training
    assert all(torch.equal(p, other) for p, other in zip(model.parameters(), before, strict=True))
    nmcompile.compile(model, "t-weights", args=(x,), config=ALL)
    assert torch.equal(x, given)


def test_hooks_of_others_are_not_the_code_of_the_module(x: Tensor) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = Reads(F.linear), nn.Linear(IN, IN)
            self.inner.register_forward_hook(lambda module, args, output: output + F.linear(args[0], module.w))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.inner(x))
            return result

    model = Outer()
    assert not capture_model(model, (x,)).routes
    compiled = nmcompile.compile(model, "t-weights", args=(x,), config=ALL)
    torch.testing.assert_close(nmcompile.finalize(compiled)(x), compiled(x))


def test_one_matrix_that_is_spread_over_a_batch_is_not_the_stack(x: Tensor) -> None:
    model = Experts(lambda m, x: torch.bmm(x[:EXPERTS], m.w[:1].transpose(1, 2).expand(EXPERTS, -1, -1)))
    compiled = nmcompile.compile(model, "t-weights", args=(x,), config=ALL)
    torch.testing.assert_close(nmcompile.finalize(compiled)(x), compiled(x))


def test_stacks_in_one_storage_are_told_apart(x: Tensor) -> None:
    both = torch.randn(2, EXPERTS, OUT, IN)
    model = Experts(lambda m, x: F.linear(x, m.w[0]) + F.linear(x, m.get_parameter("v")[1]))
    model.w, model.v = nn.Parameter(both[0]), nn.Parameter(both[1])
    compiled = nmcompile.compile(model, "t-weights", args=(x,), config=ALL)
    assert {layer.name for layer in nmcompile.inspect(compiled).layers} == {"w", "v", "head"}
    torch.testing.assert_close(nmcompile.finalize(compiled)(x), compiled(x))


@pytest.mark.parametrize("name", ["batched", "by_einsum_of_each", "batched_in_out", "in_a_loop"])
def test_no_tokens_at_all(name: str, x: Tensor) -> None:
    model = made(name)
    compiled = nmcompile.compile(model, "t-weights", args=(x,), config=ALL)
    found, expected = gradients(compiled, x[:, :0]), gradients(model, x[:, :0])
    assert [one.shape for one in found] == [one.shape for one in expected] and not any(one.any() for one in found)


def test_a_bias_that_is_added_apart_keeps_the_type_of_autocast(x: Tensor) -> None:
    types = list[torch.dtype]()

    def multiply(m: Experts, x: Tensor) -> Tensor:
        y = torch.stack([F.linear(one, m.w[i % EXPERTS], m.bias) for i, one in enumerate(x)])
        types.append(y.dtype)
        return y

    compiled = nmcompile.compile(Experts(multiply), "t-weights", args=(x,), config=ALL)
    with torch.autocast("cpu", torch.bfloat16):
        compiled(x)
    assert types[-1] is torch.bfloat16


def test_modes_that_read_differently_stay_python(x: Tensor) -> None:
    class Merged(Reads):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(F.linear(x, self.w if bool(x.isnan().any()) or self.training else self.w * 2))
            return result

    for training in (True, False):
        assert not capture_model(Merged(torch.add).train(training), (x,)).routes


def test_a_detached_weight_in_another_branch_gets_no_gradient(x: Tensor) -> None:
    model = Reads(lambda x, w: F.linear(x, w.detach() if x.dim() == 2 else w))
    compiled = nmcompile.compile(model, "t-weights", args=(x,), config=ALL)
    compiled(x[0]).sum().backward()
    assert model.w.grad is None and model.head.weight.grad is not None
    torch.testing.assert_close(nmcompile.finalize(compiled)(x[0]), compiled(x[0]))


def test_a_routed_model_is_a_module_like_any_other(x: Tensor) -> None:
    model = made("in_a_loop")
    compiled = nmcompile.compile(model, "t-weights", args=(x,), config=ALL)
    assert isinstance(compiled, Experts) and inspect.signature(compiled.forward) == inspect.signature(model.forward)
    assert compiled.forward.__doc__ == model.forward.__doc__
    assert list(compiled.state_dict()) == list(model.state_dict())
    expected = compiled(x)
    for copied in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert torch.equal(copied(x), expected)
    with torch.no_grad():
        compiled.w.mul_(torch.rand_like(compiled.w))
    state = nmcompile.sparse_state_dict(compiled)
    other = nmcompile.compile(made("in_a_loop"), "t-weights", args=(x,), config=ALL)
    other.load_state_dict(compiled.state_dict())
    nmcompile.load_sparse_state_dict(other, state)
    assert torch.equal(other(x), compiled(x))
    plain = nmcompile.decompile(compiled)
    assert type(plain) is Experts and plain.w is compiled.w and not torch.equal(plain(x), compiled(x))


def test_training_on_a_stack_is_resumed_bit_for_bit(x: Tensor) -> None:
    def trained(steps: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(steps):
            gradients(model, x)
            optimizer.step()

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nmcompile.compile(made("grouped"), "training", args=(x,), config=ALL)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    whole, optimizer = fresh()
    trained(6, whole, optimizer)
    first, optimizer = fresh()
    trained(3, first, optimizer)
    second, other = fresh()
    second.load_state_dict(first.state_dict())
    nmcompile.load_sparse_state_dict(second, nmcompile.sparse_state_dict(first))
    other.load_state_dict(optimizer.state_dict())
    trained(3, second, other)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


class Attends(nn.Module):
    """Attention by torch's function, with the weights of layers or with a packed one (WavLM's code)."""

    def __init__(self, is_packed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(IN, IN) for _ in range(4))
        self.packed = nn.Parameter(torch.randn(3 * IN, IN)) if is_packed else None

    def forward(self, x: Tensor) -> Tensor:
        apart = {"use_separate_proj_weight": True, "q_proj_weight": self.q.weight, "k_proj_weight": self.k.weight}
        biases = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        rest = None, None, False, 0.0, self.out.weight, self.out.bias
        given: Any = {} if self.packed is not None else apart | {"v_proj_weight": self.v.weight}
        y, _ = F.multi_head_attention_forward(x, x, x, IN, 2, self.packed, biases, *rest, **given)
        return y


@pytest.mark.parametrize("is_packed", [False, True])
def test_projections_of_torchs_attention_function_are_layers(is_packed: bool, x: Tensor) -> None:
    plain, names = Attends(is_packed), {"packed", "out"} if is_packed else {"q", "k", "v", "out"}
    dense = nmcompile.compile(plain, "dense", args=(x,))
    for found, expected in zip(gradients(dense, x), gradients(plain, x), strict=True):
        assert torch.equal(found, expected)
    compiled = nmcompile.compile(plain, "t-weights", args=(x,), config=ALL)
    report = nmcompile.verify(compiled)
    assert report.ok and {check.name.removesuffix(".weight") for check in report.checks} == names
    assert_close(gradients(compiled, x), gradients(nmcompile.finalize(compiled), x))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(compiled, backend="eager")(x), compiled(x))


@pytest.mark.parametrize("masks", ["wanda", "sparsegpt", "admm"])
def test_masks_of_experts_are_found_from_their_own_inputs(masks: Any, x: Tensor) -> None:
    """Two in-features of one expert's inputs are zero: methods that look at data drop their weights."""
    model = made("in_a_loop").eval()
    data = torch.randn(8, 4, IN)
    data[1::EXPERTS, :, :2] = 0.0
    config = CompileConfig(ends="sparse", masks=masks)
    compiled = nmcompile.compile(model, "weights", args=(x,), config=config, calibration=[data, data.flip(1)])
    final = nmcompile.finalize(compiled)
    w = final.get_parameter("w")
    assert not w[1, :, :2].any() and w[0, :, :2].any()
    assert nmcompile.verify(final).ok and nmcompile.inspect(compiled).layer("w").found is not None
    torch.testing.assert_close(final(x), compiled(x))


@pytest.mark.parametrize("name", ["batched", "batched_in_out", "by_einsum", "by_einsum_of_each", "matrix_in_out"])
def test_a_stack_is_exported(name: str, tmp_path: Any) -> None:
    """`export` compares the file with the module in ONNX Runtime; the weights in it obey their patterns."""
    call, shape = CASES[name]

    class Net(Experts):
        def __init__(self) -> None:
            super().__init__(call, shape)
            self.first = nn.Linear(IN, IN)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            result: Tensor = self.head(call(self, self.first(x * scale if scale != 1.0 else x).relu()))
            return result

    x = torch.randn(EXPERTS, 64, IN)
    config = CompileConfig(ends="sparse", layers={"first": None})
    model = nmcompile.compile(Net().eval(), "inference", args=(x,), calibration=[x], config=config)
    report = nmcompile.export(model, tmp_path / "model.onnx", args=(x,), dynamic_batch=False)
    assert "w" in {node.layer for node in report.onnx.nodes}
    assert nmcompile.verify(tmp_path / "model.onnx").ok


@pytest.mark.parametrize("name", ["matrix", "matrix_in_out", "batched", "by_einsum", "in_a_loop"])
def test_torch_compile_takes_code_with_routes(name: str, x: Tensor) -> None:
    """Code that takes one matrix of a stack, or that a graph cannot take whole, runs in Python between the graphs."""
    call, shape = CASES[name]

    class Net(Experts):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            result: Tensor = self.head(call(self, x * scale if scale != 1.0 else x))
            return result

    for kind in (Net, Experts):
        torch.compiler.reset()
        compiled = nmcompile.compile(kind(call, shape), "t-weights", args=(x,), config=ALL)
        traced: Any = torch.compile(compiled, backend="eager", fullgraph=kind is Net and name != "in_a_loop")
        assert_close(gradients(traced, x), gradients(compiled, x))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_of_hugging_face_train_and_finalize(implementation: str) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=32, num_local_experts=4, max_position_embeddings=32,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.set_experts_implementation(implementation)
    tokens = torch.randint(0, 32, (2, 12))
    compiled = nmcompile.compile(model, kwargs={"input_ids": tokens})
    names = {layer.name for layer in nmcompile.inspect(compiled).layers if layer.plan.rewritten}
    assert {f"model.layers.0.mlp.experts.{name}_proj" for name in ("gate_up", "down")} <= names
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = compiled(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and nmcompile.verify(compiled).ok
    final: Any = nmcompile.finalize(compiled.eval())
    torch.testing.assert_close(final(tokens).logits, compiled(tokens).logits)
    assert final.generate(tokens[:1], max_new_tokens=3, do_sample=False).shape == (1, 15)
