"""Masks and random streams that belong to parameters: graphs of torch.compile come and go, and share parameters."""

import gc
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from torch import nn
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from nmcompile.ir.captured import Facts
from nmcompile.three_gemm.draw_stream import DrawStream
from nmcompile.three_gemm.triple import GemmTriple
from nmcompile.training.bind_layers import TripleFactory
from nmcompile.training.masks import WeightMask


class _Owner(nn.Module):
    """The owner of a parameter in the eyes of its mask, which does not keep the parameter alive."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.reference = TensorWeakRef(parameter)

    @property
    def weight(self) -> object:
        return self.reference()


@dataclass
class _Kept:
    """State of a parameter that later graphs take over.

    Args:
        name: of the layer that its first graph found.
        first, last: whether that layer was an end of the model.
        streams: one for each call in a graph.
    """

    name: str
    owner: _Owner
    first: bool
    last: bool
    mask: WeightMask | None = None
    streams: list[DrawStream] = field(default_factory=list)


class ParameterMasks:
    """The masks of the parameters that graphs compiled with the same options read; a parameter's go with it."""

    def __init__(self) -> None:
        self._kept: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._kept

    def of(self, parameters: Iterable[nn.Parameter]) -> Iterator[tuple[nn.Parameter, WeightMask]]:
        """Yield these of the parameters that have a mask, and the masks."""
        for parameter in parameters:
            kept = self._kept.get(parameter)
            if kept is not None and kept.mask is not None:
                yield parameter, kept.mask

    def settle(self, parameter: nn.Parameter, name: str, facts: Facts) -> tuple[str, Facts]:
        """Return the name and the ends of the layer that reads a weight, as the first graph with this weight had them.

        The name is one that no other parameter's layer has, for parts of a model may hold layers of the same name.
        """
        kept = self._kept.get(parameter)
        if kept is None:
            kept = _Kept(self._free(name), _Owner(parameter), facts.first, facts.last)
            self._kept[parameter] = kept
        return kept.name, replace(facts, first=kept.first, last=kept.last)

    def _free(self, name: str) -> str:
        """Return a name that no other layer draws by: layers of the same name must not draw alike."""
        if name in self._taken():
            gc.collect()  # a model that nobody holds must not decide how the next one draws
        taken = self._taken()
        numbered = (f"{name}#{number}" for number in range(2, len(taken) + 2))
        return name if name not in taken else next(one for one in numbered if one not in taken)

    def _taken(self) -> set[str]:
        return {kept.name for kept in self._kept.values()}

    def bind(self, factory: TripleFactory, model: nn.Module) -> dict[str, GemmTriple]:
        """Make the layers of a graph, with the masks and streams of the parameters in `model` that they read."""
        calls, triples = Counter[int](), dict[str, GemmTriple]()
        for site in factory.rewritten_sites():
            parameter = model.get_parameter(site.weight)
            kept = self._kept[parameter]
            if kept.mask is not None:
                kept.mask.look()  # a write so far must not pass for known
                factory.masks[id(parameter)] = kept.mask
            triple = triples[site.layer.name] = factory.make(site)
            if isinstance(triple.mask, WeightMask):
                kept.mask = triple.mask
                kept.mask.owners[kept.owner] = "weight"
            number = calls[id(parameter)]
            if number == len(kept.streams):
                name = kept.name if number == 0 else f"{kept.name}@{number}"
                kept.streams.append(DrawStream(triple.stream.seed, name, triple.stream.replicas))
            triple.stream = kept.streams[number]
            calls[id(parameter)] += 1
        return triples


_masks: dict[str, ParameterMasks] = {}


def masks_under(options: str) -> ParameterMasks:
    """Return the masks of all graphs that were compiled with the options that this text tells."""
    return _masks.setdefault(options, ParameterMasks())


def masks_by_graphs(model: nn.Module) -> dict[str, WeightMask]:
    """Return the masks that graphs of torch.compile prune a model's parameters by, of the last options with any."""
    named = dict(model.named_parameters())
    for masks in reversed(_masks.values()):
        found = {id(parameter): mask for parameter, mask in masks.of(named.values())}
        if found:
            return {name: found[id(parameter)] for name, parameter in named.items() if id(parameter) in found}
    return {}
