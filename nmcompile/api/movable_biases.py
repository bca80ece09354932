"""Biases that may take up the mean error of a layer: parameters, or parts of them, that nothing else reads."""

from collections import defaultdict

from torch import Tensor, nn

from nmcompile.api.solved_parts import Part
from nmcompile.api.stops import Stop
from nmcompile.capture.weight_reads import find_bias_reads
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.modules import ThreeGemmLayer, ThreeGemmRegion, run_three_gemm
from nmcompile.three_gemm.stored_weights import find_place


class MovableBiases:
    """The readers of the biases of a compiled model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parts: dict[tuple[int, int], set[Part]] = defaultdict(set)
        modules = {triple.site.module: model.get_submodule(triple.site.module) for triple in triples_of(model)}
        layers = {id(module): name for name, module in modules.items() if isinstance(module, ThreeGemmLayer)}
        self.read_by_code = find_bias_reads(model, layers)

    def note(self, stop: Stop) -> None:
        """Count a call as a reader of its bias."""
        if stop.bias is not None:
            self.parts[_memory(stop.bias)].add(stop.part)

    def may_move(self, stop: Stop) -> bool:
        """Return whether only the layer of a call reads its bias."""
        if stop.bias is None or stop.triple.site.module in self.read_by_code:
            return False
        place = find_place(self.model, stop.triple.site, stop.bias)
        if place is None or len(self.parts[_memory(stop.bias)] | {stop.part}) > 1:
            return False
        parameter = self.model.get_parameter(place.parameter)
        readers = sum(one is parameter for module in self.model.modules() for one in module._parameters.values())
        return readers == 1 and not self._is_read_beside(stop, place.parameter)

    def _is_read_beside(self, stop: Stop, parameter: str) -> bool:
        """Return whether a generated forward hands a parameter to a layer and to other code too."""
        module = self.model.get_submodule(stop.triple.site.module)
        if not isinstance(module, ThreeGemmRegion):
            return False
        own = parameter.removeprefix(f"{stop.triple.site.module}.")
        reads = (node for node in module.three_gemm_graph.nodes if node.op == "get_attr" and node.target == own)
        are_layers = [user.target is run_three_gemm for node in reads for user in node.users]
        return any(are_layers) and not all(are_layers)


def _memory(x: Tensor) -> tuple[int, int]:
    return x.untyped_storage().data_ptr(), int(x.storage_offset())
