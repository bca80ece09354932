"""A tensor in the place of another is like it in all but its values."""

from typing import Any

import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from nmcompile.three_gemm.like import like


def test_attributes_strides_and_hooks_stay() -> None:
    old: Any = nn.Parameter(torch.zeros(6, 4).T)
    old.tag = "kept"
    old.register_hook(lambda gradient: gradient * 3)
    new: Any = like(old, torch.ones(4, 6))
    assert new.stride() == old.stride()
    assert new.tag == "kept"
    new.sum().backward()
    assert torch.equal(new.grad, torch.full((4, 6), 3.0))
    assert old.grad is None
    assert isinstance(new, nn.Parameter)


def test_a_subclass_keeps_its_new_values() -> None:
    old: Any = nn.Parameter(TwoTensor(torch.zeros(4), torch.zeros(4)), requires_grad=False)
    old.tag = "kept"
    new: Any = like(old, TwoTensor(torch.ones(4), torch.ones(4)))
    assert new.tag == "kept"
    assert torch.equal(new.a, torch.ones(4))
    assert not new.requires_grad
