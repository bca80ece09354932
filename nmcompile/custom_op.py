"""Custom operators of torch, each with one signature.

PyTorch's dispatcher and its Python wrappers take longer than many a small kernel. So a call goes through them only
where something has to see the operator: a compiler, a tracer, a mode, a profiler, autograd, or a subclass of Tensor.
Any other call runs the function.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from inspect import Signature, signature
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload

from nmcompile.sharded import PLAIN

UNSEEN = frozenset({*PLAIN, type(None), bool, int, float, str, tuple, list})
"""Types of arguments that hide no subclass of Tensor."""

ANY_STRIDES = (torch.Tag.flexible_layout,)
"""Tags of an operator that takes operands of any strides, as they are.

For any other operator inductor copies operands to the strides that they have in eager mode: images, as it computes
convolutions in channels last, and gradients of attention, once for each operator that reads them.
"""

LIBRARY = torch.library.Library("nmcompile", "FRAGMENT")

# Looked up once: each operator of each small layer asks all of them.
is_grad_enabled = torch.is_grad_enabled
dispatch_modes = torch._C._len_torch_dispatch_stack
function_modes = torch._C._len_torch_function_stack
are_transforms_active = torch._C._are_functorch_transforms_active
tracing_state = torch._C._get_tracing_state
is_profiling = torch._C._autograd._profiler_enabled

P = ParamSpec("P")
R = TypeVar("R")


def custom_op(
    name: str,
    fake: Callable[..., object] | None = None,
    mutates_args: Iterable[str] = (),
    settled: Callable[..., object] | None = None,
    tags: Sequence[torch.Tag] = (),
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function an operator that `torch.compile` calls as it is; the operator is `torch.ops.namespace.name`.

    Args:
        name: `"namespace::name"`.
        fake: returns empty tensors like those that the function returns. It takes the function's parameters that it
            names, and no others. None for a function that returns nothing.
        mutates_args: the parameters that the function writes.
        settled: for a function that chooses a kernel, one that always runs the dense kernel.
        tags: what compilers may assume of the operator.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        definition = torch.library.custom_op(name, function, mutates_args=mutates_args, tags=tags)
        if fake is not None:
            definition.register_fake(_taking_all(signature(function), fake))
        namespace, _, base = name.partition("::")
        operator: Callable[P, R] = getattr(getattr(torch.ops, namespace), base).default

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            run = operator if is_seen((*args, *kwargs.values()) if kwargs else args) else function
            return run(*args, **kwargs)

        setattr(call, "operator", operator)  # noqa: B010 - functions declare no attributes
        setattr(call, "direct", settled or function)  # noqa: B010
        return call

    return register


def cpu_op(name: str, fake: Callable[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function the operator `nmcompile::name` of tensors on the CPU, for graphs without gradients.

    The wrappers that `torch.library.custom_op` adds, for autograd among others, take as long as the product of a small
    layer and one token.

    Args:
        name: without the namespace.
        fake: returns an empty tensor like that which the function returns for the same arguments.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
        LIBRARY.impl(name, function, "CPU")
        torch.library.register_fake(f"nmcompile::{name}", fake, lib=LIBRARY)
        operator: Callable[P, R] = getattr(torch.ops.nmcompile, name).default
        return operator

    return register


def operator_of(call: Callable[..., object]) -> OpOverload:
    """Return the operator of a function that `custom_op` made."""
    operator: OpOverload = getattr(call, "operator")  # noqa: B009
    return operator


def direct(target: Callable[..., object]) -> Callable[..., object]:
    """Return the function to call where nothing sees the operator of `target` and no kernel has to be chosen."""
    found: Callable[..., object] = getattr(target, "direct", target)
    return found


def shown_name(target: object) -> str:
    """Return the name of a function for people: that of its operator, which names the backend, if it has one."""
    operator = getattr(target, "operator", None)
    return str(operator.overloadpacket.__name__ if operator is not None else getattr(target, "__name__", target))


def is_seen(args: Iterable[object], by_profiler: bool = True) -> bool:
    """Return whether something has to see the operator that is called with these arguments.

    `by_profiler` says whether a profiler counts: it would see another kernel than the one that runs without it.
    """
    # Outside of Dynamo, a compiler shows by its modes.
    if torch.compiler.is_dynamo_compiling() or is_grad_enabled():
        return True
    if dispatch_modes() or function_modes() or are_transforms_active() or tracing_state():
        return True
    if by_profiler and is_profiling():
        return True
    for x in args:  # noqa: SIM110 - a generator would take longer than the tests
        if type(x) not in UNSEEN and isinstance(x, Tensor):
            return True
    return False


def _taking_all(whole: Signature, fake: Callable[..., object]) -> Callable[..., object]:
    """Return a function of the whole signature, which calls `fake` with the parameters that it names."""
    names = signature(fake).parameters

    def call(*args: object, **kwargs: object) -> object:
        given = whole.bind(*args, **kwargs)
        given.apply_defaults()
        return fake(**{name: given.arguments[name] for name in names})

    return call
