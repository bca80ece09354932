"""Copies of modules and graphs that share every tensor."""

import copy

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

from nmcompile.three_gemm.instance_forward import forward_slot
from nmcompile.three_gemm.unsharded import without_hooks


def shallow_clone(module: nn.Module) -> nn.Module:
    """Return a module of the same class, with its own tables of the same parameters, buffers and children."""
    clone = object.__new__(type(module))
    clone.__dict__.update(module.__dict__)
    for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        clone.__dict__[table] = copy.copy(module.__dict__[table])
    return clone


def own_copy(graph: fx.Graph) -> fx.Graph:
    """Return a copy without an owning module: keep defaults and calling convention, drop annotations."""
    result, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    output = result.graph_copy(graph, copies)
    if output is not None:
        result.output(output)
    result.set_codegen(graph._codegen)
    for node in result.nodes:
        node.type, node.meta = None, {}
    return result


def shadow_tree(module: nn.Module, made: dict[int, nn.Module] | None = None) -> nn.Module:
    """Copy a module tree in eval mode, sharing every tensor, without the hooks that split tensors among processes."""
    if isinstance(module, torch.jit.ScriptModule):
        return module
    made = {} if made is None else made
    if id(module) not in made:
        clone = object.__new__(type(module))
        made[id(module)] = clone
        clone.__dict__.update(without_hooks(module.__dict__))
        clone.__dict__["training"] = False
        if forward_slot(module):  # bound to the original module; the class has the same forward
            del clone.__dict__["forward"]
        for table in ("_parameters", "_buffers"):
            clone.__dict__[table] = dict(module.__dict__[table])
        children = module._modules.items()
        clone.__dict__["_modules"] = {name: m if m is None else shadow_tree(m, made) for name, m in children}
    return made[id(module)]


def fake_clone(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Return a copy of the module tree with fake tensors."""
    clone = object.__new__(type(module))
    clone.__dict__.update(module.__dict__)
    for table in ("_parameters", "_buffers"):
        tensors = module.__dict__[table]
        clone.__dict__[table] = {k: None if t is None else mode.from_tensor(t) for k, t in tensors.items()}
    clone.__dict__["_modules"] = {k: None if m is None else fake_clone(m, mode) for k, m in module._modules.items()}
    for name, value in module.__dict__.items():
        if isinstance(value, Tensor):
            clone.__dict__[name] = mode.from_tensor(value)
        elif isinstance(value, list | dict) and not name.startswith("_"):
            clone.__dict__[name] = copy.copy(value)
    return clone
