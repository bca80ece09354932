"""Capture of a model: its layers, where they run, and what is known about them."""

from collections.abc import Mapping, Sequence

from torch import nn

from nmcompile.arguments import Args, Kwargs
from nmcompile.capture.adapters import find_adapters, read_by_adapters
from nmcompile.capture.by_hand import find_by_hand
from nmcompile.capture.exported import Exported, export_whole
from nmcompile.capture.facts import facts_from_graph, facts_without_graph
from nmcompile.capture.judge_code import judge_reads, multiplied_by_code, still_python
from nmcompile.capture.outline import outline
from nmcompile.capture.regions import find_regions
from nmcompile.capture.replay import differing_forwards
from nmcompile.capture.routes import Routes, find_routes, known_routes
from nmcompile.capture.sites import FoundSite, ModuleLayers, find_module_layers, is_recurrent, own_matrices
from nmcompile.capture.state import unchanged
from nmcompile.capture.stitch import stitch
from nmcompile.capture.weight_reads import find_weight_reads
from nmcompile.errors import CaptureError
from nmcompile.ir.captured import Captured, Site, WholeGraph
from nmcompile.ir.storage_key import storage_key
from nmcompile.sharded import FSDP1, is_flat, is_sharded


def capture_model(
    model: nn.Module, args: Args | None = None, kwargs: Kwargs | None = None, earlier: Captured | None = None
) -> Captured:
    """Find every conv and linear of a model, without changing the model or any random state.

    Args:
        model: any module; a `GraphModule` is captured from its own graph.
        args: example inputs. With them `torch.export` finds the whole graph, also of models that fx cannot trace, and
            the number of positions at each layer.
        kwargs: example inputs by name.
        earlier: the same model, captured before: without an example, what one had shown then is known.

    Raises:
        CaptureError: the model has no conv or linear layer, or refuses `args`.
    """
    if any(map(is_flat, model.parameters())):
        raise CaptureError(f"{type(model).__name__} has parts in a {FSDP1}")
    with unchanged(model) as memory:
        layers = find_module_layers(model)
        protected = frozenset(map(storage_key, [*model.parameters(), *memory.tensors.values()]))
        regions = find_regions(model, layers.found, protected, {})
        if regions.traces and (args is not None or kwargs) and not any(map(is_sharded, model.parameters())):
            differing = differing_forwards(model, regions.traces, args or (), kwargs or {})
            regions = find_regions(model, layers.found, protected, differing) if differing else regions
        found = [*layers.found, *regions.found]
        reads = find_weight_reads(model, layers.found, regions.called)
        code = multiplied_by_code(model, layers, regions, reads)
        routes = _routes(model, found, code, frozenset(regions.traces), (args, kwargs), earlier)
        found = _in_module_order(model, [*found, *routes.found])
        python = still_python(model, layers, regions, found)
        if not found:
            raise CaptureError(_nothing_found(model, layers, python))
        sites = [one.site for one in found]
        example = _example(model, found, args, kwargs)
        whole, reason = _whole(model, found, protected, example)
        adapters, recurrent = find_adapters(model, found), _recurrent(model, sites)
        aside = adapters | recurrent
        if whole is None:
            facts = facts_without_graph(model, sites, outline(model, found, protected), aside)
        else:
            facts = facts_from_graph(model, sites, whole, example.positions if example else {}, aside)
        bypassed, suspected = judge_reads(layers.found, regions, reads, routes, example)
    return Captured(
        sites=tuple(sites),
        facts=facts,
        skipped=layers.skipped,
        python=python,
        uncaptured=_uncaptured(model, [*layers.skipped, *python], regions.uncaptured),
        parameters={name: tuple(parameter.shape) for name, parameter in _known_parameters(model).items()},
        behind=_named(model, {one.site.layer.name: one.parameters for one in found}),
        bypassed=read_by_adapters(model) | dict(bypassed),
        suspected=suspected,
        tied=_tied(model, found),
        adapters=adapters,
        recurrent=recurrent,
        traces=regions.traces,
        routes=routes.by_module,
        by_hand=find_by_hand(model, sites, {*regions.traces, *routes.by_module}),
        untraced=frozenset(routes.untraced if whole and whole.source == "export" else routes.by_module),
        whole=whole,
        whole_reason=reason,
    )


def _example(model: nn.Module, found: list[FoundSite], args: Args | None, kwargs: Kwargs | None) -> Exported | None:
    """Run and export the example with torch.export, if one is given."""
    if any(map(is_sharded, model.parameters())):
        return Exported(None, failure="torch.export does not take weights that are split among processes")
    if args is None and not kwargs:
        return None
    return export_whole(model, found, args or (), dict(kwargs or {}))


def _whole(
    model: nn.Module,
    found: list[FoundSite],
    protected: frozenset[int],
    example: Exported | None,
) -> tuple[WholeGraph | None, str]:
    if example is not None and example.whole is not None:
        return example.whole, ""
    failure = example.failure if example else ""
    whole, reason = stitch(model, found, protected)
    if reason and not failure:
        reason += "; passing args= helps"
    return whole, "; ".join(filter(None, (failure, reason)))


def _routes(
    model: nn.Module,
    found: Sequence[FoundSite],
    code: frozenset[int],
    generated: frozenset[str],
    example: tuple[Args | None, Kwargs | None],
    earlier: Captured | None,
) -> Routes:
    """Return how code multiplies by these parameters, as a run of an example shows now or showed before."""
    args, kwargs = example
    if (args is None and not kwargs) or any(map(is_sharded, model.parameters())):
        return Routes() if earlier is None else known_routes(model, earlier)
    return find_routes(model, found, code, generated, args or (), kwargs or {})


def _in_module_order(model: nn.Module, found: list[FoundSite]) -> list[FoundSite]:
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda one: order[one.site.module])


def _tied(model: nn.Module, found: Sequence[FoundSite]) -> dict[str, str]:
    owners = {id(module.weight): name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return {
        one.site.layer.name: owners[parameter] for one in found for parameter in one.parameters if parameter in owners
    }


def _recurrent(model: nn.Module, sites: Sequence[Site]) -> frozenset[str]:
    return frozenset(site.layer.name for site in sites if is_recurrent(model.get_submodule(site.module)))


def _known_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by name, without lazy ones that have no shape yet."""
    return {name: p for name, p in model.named_parameters() if not isinstance(p, nn.UninitializedParameter)}


def _uncaptured(
    model: nn.Module, modules: Sequence[str], read: Mapping[str, frozenset[int]]
) -> dict[str, tuple[str, ...]]:
    """Return by module name the parameters that its code multiplies by: those in its trace, else its own matrices."""
    ids = {one: read[one] if one in read else own_matrices(model.get_submodule(one)) for one in modules}
    return _named(model, {one: found for one, found in ids.items() if found})


def _named(model: nn.Module, ids: Mapping[str, frozenset[int]]) -> dict[str, tuple[str, ...]]:
    """Return the sorted names of the parameters with these ids."""
    names = {id(parameter): name for name, parameter in _known_parameters(model).items()}
    return {key: tuple(sorted(names[one] for one in found if one in names)) for key, found in ids.items()}


def _nothing_found(model: nn.Module, layers: ModuleLayers, python: Mapping[str, str]) -> str:
    seen = {**layers.skipped, **python}
    listed = "; ".join(f"{name or 'the model itself'}: {reason}" for name, reason in list(seen.items())[:5])
    if not listed:
        return f"{type(model).__name__} has no conv or linear layer to compile"
    return f"{type(model).__name__} has no conv or linear layer that can be compiled ({listed})"
