"""The report on a compiled model."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from weakref import ref

from torch import Tensor, nn

from nmcompile.api.compiled_graphs import graphs_of, merged, own_module
from nmcompile.api.decompile import is_compiled
from nmcompile.api.sample_layers import run_copy
from nmcompile.api.torch_options import MODULE_ONLY
from nmcompile.arguments import Args, Kwargs
from nmcompile.checks import check_call, check_compiled
from nmcompile.errors import ConfigError
from nmcompile.ir.layer_sample import LayerSample
from nmcompile.report.layers import Observation
from nmcompile.report.report import Report, build_report, no_masks
from nmcompile.sharded import is_sharded
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.record import Compilation, record_of
from nmcompile.three_gemm.stored_weights import stored_weight


def inspect(compiled: nn.Module, *, args: Args | None = None, kwargs: Kwargs | None = None) -> Report:
    """Return a report on a compiled model: for each layer its plan, the reasons, and observations at run time.

    With `args` or `kwargs` a copy of the model first makes a step, forward and backward in `train()`, which the report
    is then about. It also has the figures of `LayerSample`: zeros of inputs, kept magnitude, and the noise that pruning
    adds to gradients.

    Args:
        compiled: a model that `compile` made, also inside DDP, FSDP2 or `torch.compile`, or one that
            `torch.compile(backend="nmcompile")` has run: the report is about its graphs so far.
        args, kwargs: real data, for one call of it. Gradients of the outputs are random.

    Raises:
        StateError: the model is not compiled.
    """
    check_compiled("compiled", compiled)
    check_call(args, kwargs)
    if not is_compiled(compiled) and (graphs := graphs_of(own_module(compiled))):
        if args is not None or kwargs:
            raise ConfigError(f"inspect takes no args for graphs of torch.compile(backend='nmcompile'); {MODULE_ONLY}")
        return _build(own_module(compiled), merged(compiled), graphs, {})
    root, record = record_of(compiled)
    ran, samples = (root, {}) if args is None and not kwargs else run_copy(root, args or (), kwargs or {})
    return _build(root, record, [ran], samples)


def _build(
    root: nn.Module, record: Compilation, ran: Sequence[nn.Module], samples: Mapping[str, LayerSample]
) -> Report:
    """Return the report on a compilation whose layers the modules in `ran` hold."""
    observed = {
        triple.layer.name: Observation(
            triple.called,
            triple.positions,
            triple.graphs.kernels(),
            triple.graphs.choices(),
            None if triple.mask is None else triple.mask.found,
            record.permutations.get(triple.layer.name, ""),
            samples.get(triple.layer.name),
        )
        for one in ran
        for triple in triples_of(one)
    }
    name = type(root).__name__
    return build_report(
        record.program,
        observed,
        model_name=name,
        mode=record.mode,
        reverted=record.reverted,
        step_times=record.step_times,
        masks=_LiveMasks(root),
    )


class _LiveMasks:
    """The masks of a model that is still there. A pickle of them is empty: it does not hold the model."""

    def __init__(self, root: nn.Module) -> None:
        self.model = ref(root)

    def __call__(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield name, weight and mask of the model's layers, without a change of its state.

        Nothing is yielded of a model that is split among processes: to gather a weight, all of them would have to ask.
        """
        root = self.model()
        if root is None or any(map(is_sharded, root.parameters())):
            return
        for triple in triples_of(root):
            weight = None if triple.mask is None else stored_weight(root, triple.site)
            if triple.mask is not None and weight is not None and not weight.is_meta:
                yield triple.layer.name, weight, triple.mask.preview(weight)

    def __deepcopy__(self, memo: dict[int, object]) -> "_LiveMasks":
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return partial, (no_masks,)
