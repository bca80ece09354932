"""Counts of the blocks that break their pattern, in the weights of a model and in the operands of a training step."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx, nn

from nmcompile.capture import capture_model
from nmcompile.checks import check_callable, check_kind, check_path
from nmcompile.config import Phase
from nmcompile.errors import ConfigError
from nmcompile.export.planned_patterns import planned_patterns
from nmcompile.files.open_onnx import open_onnx
from nmcompile.files.read_weights import read_weights
from nmcompile.ir.grouping import grouped
from nmcompile.ir.layers import Layer
from nmcompile.ir.node_meta import find_meta
from nmcompile.ir.plan import Axis, Operand, PlanRow
from nmcompile.printable import table
from nmcompile.pruning.pattern import NMPattern
from nmcompile.three_gemm.effective_weight import effective_weight
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.observer import Observer, Results, Values, observing
from nmcompile.three_gemm.record import RECORD, bypassed_layers
from nmcompile.three_gemm.stored_weights import named_weight
from nmcompile.three_gemm.triple import GemmTriple
from nmcompile.training.bind_layers import count_violations
from nmcompile.training.earlier import full_name
from nmcompile.training.finalized import FINALIZED
from nmcompile.training.find_masks import masks_among
from nmcompile.training.masks import WeightMask


@dataclass(frozen=True)
class TensorCheck:
    """One tensor along one axis: how many of its blocks hold more than N non-zeros."""

    name: str
    operand: Operand
    axis: Axis
    pattern: NMPattern
    blocks: int
    violations: int


@dataclass(frozen=True)
class VerifyReport:
    """All checked tensors; `ok` if none breaks its pattern."""

    checks: tuple[TensorCheck, ...]

    @property
    def ok(self) -> bool:
        return all(check.violations == 0 for check in self.checks)

    def __str__(self) -> str:
        if not self.checks:
            return "nothing in it is pruned, so there are no blocks to count"
        rows = [[c.name, c.operand, str(c.pattern), c.axis, c.blocks, c.violations] for c in self.checks]
        counts = table(rows, headers=["tensor", "operand", "pattern", "along", "blocks", "violations"])
        broken = sum(check.violations > 0 for check in self.checks)
        verdict = "every block holds" if self.ok else f"{broken} of {len(self.checks)} checks fail"
        return f"{counts}\n\n{verdict}"


def verify(
    target: nn.Module | str | os.PathLike[str],
    pattern: str | NMPattern | None = None,
    *,
    step: Callable[[], object] | None = None,
) -> VerifyReport:
    """Check a model, or an ONNX file, against its patterns.

    Args:
        target: a compiled model, judged by its effective weights and its own plan, or a finalized model, judged by
            what it was finalized from, both also inside others (DDP, an average, a parent module); or any other
            module, whose conv and linear weights are checked against `pattern` along in-channels; or the path of an
            ONNX file, judged by what `export` wrote into it, or by `pattern`. Every process has to call for a
            model that is split by FSDP2 or tensor parallelism.
        pattern: for a module that is neither compiled nor finalized, or a file that `export` did not write.
        step: runs one forward and backward of a compiled model; every pruned operand of every GEMM that it runs is
            then checked too.

    Raises:
        ConfigError: a plain module, or a file of another writer, without a pattern.
        FileError: a damaged or hostile file.
    """
    check_kind("target", target, nn.Module | str | os.PathLike, "a model, or the path of an ONNX file")
    if step is not None:
        check_callable("step", step, "a function without arguments that runs a forward and a backward of the model")
    wanted = None if pattern is None else NMPattern.parse(pattern)
    if not isinstance(target, nn.Module):
        if step is not None:
            raise ConfigError("step runs a compiled model, and target is a file; leave step out")
        return VerifyReport(tuple(_file_checks(check_path("target", target), wanted)))
    roots = _roots(target)
    if wanted is not None:
        checks = list(_plain_checks(target, wanted))
    elif roots:
        checks = [check for path, root in roots.items() for check in _root_checks(path, root)]
    else:
        raise ConfigError(
            f"{type(target).__name__} is neither compiled nor finalized; give the pattern to check it for"
        )
    if step is not None:
        checks += _step_checks(target, roots, step)
    return VerifyReport(tuple(checks))


def _file_checks(path: str | os.PathLike[str], pattern: NMPattern | None) -> Iterator[TensorCheck]:
    file = open_onnx(path)
    weights, planned = read_weights(file), planned_patterns(file)
    if pattern is None and planned is None:
        raise ConfigError(f"{file.name} does not say what its weights were pruned to; give the pattern to check it for")
    for weight in weights:
        wanted = pattern or (planned or {}).get(weight.node)
        if wanted is None:
            continue
        blocks = -(-weight.rows.shape[-1] // wanted.block) * (weight.rows.size // max(1, weight.rows.shape[-1]))
        # Zeros that a runtime cannot see do not count.
        violations = weight.violations(wanted) if not weight.hidden_by else max(1, blocks)
        yield TensorCheck(weight.node, "weight", "in", wanted, blocks, violations)


def _plain_checks(model: nn.Module, pattern: NMPattern) -> Iterator[TensorCheck]:
    for site in capture_model(model).sites:
        weight = named_weight(model, site.weight)
        if weight is not None:
            yield _check(site.weight, "weight", "in", weight.detach(), pattern, site.layer.in_dim)


def _roots(model: nn.Module) -> dict[str, nn.Module]:
    """Return the compiled and finalized models, by their path in the model that is or holds them."""
    roots: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module not in inside and not {RECORD, FINALIZED}.isdisjoint(module.__dict__):
            roots[path] = module
            inside.update(module.modules())
    return roots


def _root_checks(path: str, root: nn.Module) -> Iterator[TensorCheck]:
    for weight, mask in _weights(root):
        yield from (replace(check, name=full_name(path, check.name)) for check in mask_checks(weight, mask))


def _weights(root: nn.Module) -> Iterator[tuple[Tensor, WeightMask]]:
    """Yield the weights as the forward GEMM reads them, except those computed inside a forward, with their masks."""
    if RECORD in root.__dict__:
        bypassed = bypassed_layers(root)
        layers = [triple for triple in triples_of(root) if triple.layer.name not in bypassed]
        read = {triple.site.weight: partial(effective_weight, root, triple) for triple in layers}
        pairs = ((read[name](), mask) for name, mask in masks_among(layers).items())
    else:
        final = root.__dict__[FINALIZED].masks.items()
        pairs = ((place.look(root) if place else named_weight(root, name), mask) for name, (mask, place) in final)
    yield from ((weight, mask) for weight, mask in pairs if weight is not None)


def mask_checks(weight: Tensor, mask: WeightMask) -> Iterator[TensorCheck]:
    """Check that a tensor of a weight's shape meets the mask's pattern: along in, or along both."""
    layer: Layer = mask.layer
    yield _check(mask.name, "weight", "in", weight.detach(), mask.pattern, layer.in_dim)
    if mask.is_transposable:
        by_group = weight.detach().unflatten(layer.out_dim, (layer.groups, -1))
        yield _check(mask.name, "weight", "out", by_group, mask.pattern, layer.out_dim + 1)


def _check(name: str, operand: Operand, axis: Axis, x: Tensor, pattern: NMPattern, dim: int) -> TensorCheck:
    blocks = -(-x.shape[dim] // pattern.block) * (x.numel() // max(1, x.shape[dim]))
    return TensorCheck(name, operand, axis, pattern, blocks, count_violations(x, pattern, dim))


def _step_checks(model: nn.Module, roots: dict[str, nn.Module], step: Callable[[], object]) -> list[TensorCheck]:
    """Run `step` with every graph interpreted node by node, and look at what its prune nodes pass on to the GEMM."""
    checks: list[TensorCheck] = []
    names = {triple: full_name(path, triple.layer.name) for path, root in roots.items() for triple in triples_of(root)}
    with observing(triples_of(model), lambda triple: _Checker(triple, names.get(triple, triple.layer.name), checks)):
        step()
    return checks


class _Checker(Observer):
    """An observer that checks the pruned operands of every GEMM that a layer runs."""

    def __init__(self, triple: GemmTriple, name: str, checks: list[TensorCheck]) -> None:
        super().__init__(triple)
        self.name = name
        self.checks = checks

    def run(self, phase: Phase, values: Values) -> Results:
        return self.triple.run_graph(phase, values, _CheckedNodes(self, phase).run)


class _CheckedNodes(fx.Interpreter):
    """An interpreter that runs one graph for a checker."""

    def __init__(self, checker: _Checker, phase: Phase) -> None:
        super().__init__(checker.triple.graphs[phase])
        self.where = f"{checker.name} ({phase.value})"
        self.layer = checker.triple.layer
        self.checks = checker.checks

    def run_node(self, n: fx.Node) -> object:
        result, meta = super().run_node(n), find_meta(n)
        if meta is None or meta.planned is None or not meta.planned.is_sparse:
            return result
        if meta.fused is not None:
            # The GEMM prunes the operand while it reads it.
            self._look_at(meta.planned, meta.fused.operand(*self.fetch_args_kwargs_from_env(n)[0]))
        # The mask of an input carries the row too, but is not an operand.
        elif isinstance(result, Tensor) and result.dtype != torch.bool:
            self._look_at(meta.planned, result)
        return result

    def _look_at(self, row: PlanRow, operand: Tensor) -> None:
        assert row.operand is not None and row.axis is not None and row.pattern is not None
        view, dim = _along(operand, row.operand, row.axis, self.layer, row.pattern)
        self.checks.append(_check(self.where, row.operand, row.axis, view, row.pattern, dim))


def _along(x: Tensor, operand: Operand, axis: Axis, layer: Layer, pattern: NMPattern) -> tuple[Tensor, int]:
    if operand != "weight":
        view, dim, _ = grouped(x, "channels" if axis in ("in", "out") else axis, layer.channel_dim, pattern.block)
        return view, dim
    if axis == "in":
        return x, layer.in_dim
    return x.unflatten(layer.out_dim, (layer.groups, -1)), layer.out_dim + 1
