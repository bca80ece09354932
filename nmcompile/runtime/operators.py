"""Operators between layers -> steps on codes, where codes can do them; else torch computes floats."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from nmcompile.export.deployed_layer import DeployedActivation
from nmcompile.runtime.builder import Builder
from nmcompile.runtime.codes import Codes, full, image_of, is_elementwise, is_identity, step_of, values_on
from nmcompile.runtime.readers import grid_of_readers
from nmcompile.runtime.steps import CODES, Add, Flatten, Image, MaxPool, Recode, Window
from nmcompile.runtime.trace import shape_of

aten = torch.ops.aten
Rule = Callable[[Builder, fx.Node], Codes | None]


def lower_operator(builder: Builder, node: fx.Node) -> object:
    """Return what a node becomes."""
    rule = elementwise if is_elementwise(node) else RULES.get(node.target)
    codes = None if rule is None else rule(builder, node)
    return builder.call(node) if codes is None else codes


def elementwise(builder: Builder, node: fx.Node) -> Codes | None:
    """Change what codes stand for."""
    source = node.all_input_nodes[0]
    codes = builder.codes_of(source)
    if codes is None:
        return None
    mapped = codes.mapped(node)
    return builder.bounded(mapped, source) if bool(mapped.values.isfinite().all()) else None


def same(builder: Builder, node: fx.Node) -> Codes | None:
    """Copy nothing."""
    source = node.all_input_nodes[0]
    codes = builder.codes_of(source)
    return None if codes is None else builder.bounded(codes, source)


def add(builder: Builder, node: fx.Node) -> Codes | None:
    """Add whole multiples of one step, if the sums are exact in float32, and each has a code.

    A bound that alone reads the sums, as a ReLU does, may leave out some of them.
    """
    if node.kwargs:
        return None
    if len(node.all_input_nodes) == 1:
        return elementwise(builder, node)
    a, b = (builder.codes_of(arg) for arg in node.args[:2])
    if (
        a is None
        or b is None
        or (a.shape, a.channel_dim) != (b.shape, b.channel_dim)
        or not torch.equal(a.step, b.step)
    ):
        return None
    first, second = a.multiples(), b.multiples()
    if first is None or second is None:
        return None
    if not torch.equal((first[:, None] + second) * a.step, a.values[:, None] + b.values):
        return None
    low, output = int(first.min() + second.min()), image_of(a.shape, a.channel_dim)
    assert output is not None
    sums = replace(a, image=output, values=torch.arange(low, int(first.max() + second.max()) + 1) * a.step)
    result, below = _bounded_by_reader(builder, node, sums) if len(sums.values) > CODES else (sums, 0)
    if len(result.values) > CODES:
        return None
    input, other = (builder.recoded(one, (n - n.min()).to(torch.uint8)) for one, n in ((a, first), (b, second)))
    builder.add(Add(input, other, output, -below, 0, len(result.values) - 1))
    return result


def _bounded_by_reader(builder: Builder, node: fx.Node, sums: Codes) -> tuple[Codes, int]:
    """Return what the only reader makes of sums, if it is elementwise, and how many codes it leaves out below."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    if reader is None or not is_elementwise(reader):
        return sums, 0
    result, below = sums.mapped(reader).trimmed()
    if len(result.values) <= CODES:
        builder.results[reader] = result
    return result, below


def cat(builder: Builder, node: fx.Node) -> Codes | None:
    """Concatenate channels: on the grid of all readers if they have one, else as codes of all values together."""
    given, shape = node.args[0], shape_of(node)
    dim = node.args[1] if len(node.args) > 1 else 0
    assert isinstance(given, list | tuple) and isinstance(dim, int)
    nodes = [one for one in given if isinstance(one, fx.Node)]
    dim %= len(shape)
    whole, parts = image_of(shape, dim), [builder.codes_of(one) for one in nodes]
    if whole is None or any(part is not None and part.channel_dim != dim for part in parts):
        return None
    wanted = grid_of_readers(node, builder.layers)
    if wanted is not None and all(builder.is_computed(one) for one in nodes):
        _write_slices(builder, [part or one for one, part in zip(nodes, parts, strict=True)], whole, wanted)
        return Codes(whole, values_on(wanted), shape, dim, step_of(wanted))
    known = [part for part in parts if part is not None]
    values = torch.cat([part.values for part in known]).unique() if len(known) == len(nodes) else torch.empty(0)
    if not 0 < len(values) <= CODES:
        return None
    _write_slices(builder, known, whole, values)
    return Codes(whole, values, shape, dim, known[0].step)


def _write_slices(
    builder: Builder, parts: Sequence[Codes | fx.Node], whole: Image, wanted: DeployedActivation | Tensor
) -> None:
    """Write codes and floats side by side, as codes of a grid, or of a sorted list of values."""
    first = 0
    for part in parts:
        shape, dim = (part.shape, part.channel_dim) if isinstance(part, Codes) else (shape_of(part), 1)
        output = Image(*whole.shape[:3], shape[dim], whole, first)
        first += shape[dim]
        if isinstance(part, Codes):
            table = torch.searchsorted(wanted, part.values) if isinstance(wanted, Tensor) else part.table(wanted)
            builder.add(Recode(part.image, output, None if is_identity(table) else full(table.to(torch.uint8))))
        else:
            assert isinstance(wanted, DeployedActivation)
            builder.encode(builder.floats(part), wanted, output)


def max_pool(builder: Builder, node: fx.Node) -> Codes | None:
    """Take the largest code, if it stands for the largest value."""
    codes = builder.codes_of(node.args[0])
    if codes is None or not codes.is_planar or not codes.rises:
        return None
    shape = shape_of(node)
    output = image_of(shape, 1)
    assert output is not None
    kernel, stride, padding, dilation = (_pair(node.args[i] if i < len(node.args) else ()) for i in range(1, 5))
    window = Window(kernel or (1, 1), stride or kernel or (1, 1), padding or (0, 0), dilation or (1, 1))
    builder.add(MaxPool(codes.image, output, window))
    return replace(codes, image=output, shape=shape)


def _pair(value: object) -> tuple[int, int] | None:
    """Return (height, width) of an argument; None if it is left out."""
    sizes = [value] if isinstance(value, int) else list(value) if isinstance(value, list | tuple) else []
    return (int(sizes[0]), int(sizes[-1])) if sizes else None


def view(builder: Builder, node: fx.Node) -> Codes | None:
    """Flatten the pixels of each sample, or give features other leading dims."""
    source = node.all_input_nodes[0]
    codes, shape = builder.codes_of(source), shape_of(node)
    if codes is None:
        return None
    codes = builder.bounded(codes, source)
    if codes.channel_dim == len(codes.shape) - 1:
        is_alike = shape[-1:] == codes.shape[-1:]
        return replace(codes, shape=shape, channel_dim=len(shape) - 1) if is_alike else None
    samples = codes.shape[0]
    if shape != (samples, torch.Size(codes.shape[1:]).numel()):
        return None
    flat = replace(codes, shape=shape, channel_dim=1)
    if codes.shape[2:] == (1, 1):
        return flat
    output = Image(samples, 1, 1, shape[1])
    builder.add(Flatten(codes.image, output))
    return replace(flat, image=output)


RULES: Mapping[object, Rule] = {
    aten.add.Tensor: add, aten.cat.default: cat, aten.max_pool2d.default: max_pool, aten.view.default: view,
    aten.reshape.default: view, aten.flatten.using_ints: view, aten.squeeze.dims: view, aten._unsafe_view.default: view,
    aten.unsqueeze.default: view, aten.clone.default: same, aten.contiguous.default: same,
}  # fmt: skip
