"""The torch model in lockstep with a runtime: each quantized layer continues from the integers of the runtime.

A value next to the middle of two steps may be rounded up after one float32 sum and down after another. Both are right.
But each such step changes the sums that read it, more of them are then rounded differently, and after a few layers of
four bits two correct runs differ as much as quantization itself does. Lockstep judges differences where they arise, and
keeps them from spreading.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor, nn

from nmcompile.errors import ExportError
from nmcompile.export.check.array_difference import Array
from nmcompile.export.check.compare_layers import HALF, LayerCheck
from nmcompile.export.check.example import Example
from nmcompile.export.check.extract_layer import LayerPart
from nmcompile.export.check.places import Place, follow, places_of
from nmcompile.export.check.run_file import Arrays, onnxruntime_runner
from nmcompile.export.deployed_layer import DeployedLayer
from nmcompile.export.write.write_onnx import ExportedNode

DIGITS = 1e-4  # steps: multiples of a step in float32 are not quite a whole number of steps apart


class Lockstep:
    """A lockstep of one file and the torch model that it was made from.

    Args:
        proto: the file, weights included.
        nodes: nodes of layers that run once.
        layers: by name.
        model: the torch model whose outputs the file should give; its modules have the layers' names.
        target: the runtime that the file was written for.

    Attributes:
        proto: the file with the integers that its layers read as further outputs.
        taken_over: the number of integers that differed so far, including those where pruning kept another element.
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        nodes: Sequence[ExportedNode],
        layers: Mapping[str, DeployedLayer],
        model: nn.Module,
        target: str,
    ) -> None:
        places = places_of(model)
        parts = [
            (node, LayerPart(proto, node.name, layers[node.layer].layer.has_bias))
            for node in nodes
            if node.layer in places
        ]
        self._inputs = [
            _Input(node.name, places[node.layer], layers[node.layer], part, target)
            for node, part in parts
            if part.integers
        ]
        self._model = model
        self._outputs = len(proto.graph.output)
        self.taken_over = 0
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(proto)
        self._tensors = {x.part.integers: x.part.input_zero.dtype for x in self._inputs}
        for name, dtype in self._tensors.items():
            kind = helper.np_dtype_to_tensor_dtype(dtype)
            self.proto.graph.output.append(helper.make_tensor_value_info(name, kind, None))

    def run(self, batch: Example, found: Arrays) -> object:
        """Run the torch model on a batch with the integers among the outputs `found` of the exposed file.

        Raises:
            ExportError: names the first layer whose input in torch is another one.
        """
        integers = dict(zip(self._tensors, found[self._outputs :], strict=True))
        differing: dict[str, int] = {}  # by tensor, so each counts once, however many layers read it
        with ExitStack() as following:
            for x in self._inputs:
                following.enter_context(follow(x.place, x.layer, partial(self._take_over, x, integers, differing)))
            try:
                return batch.run(self._model)
            finally:
                self.taken_over += sum(differing.values())

    def _take_over(
        self, input: "_Input", integers: Mapping[str, Array], differing: dict[str, int], x: Tensor
    ) -> Tensor:
        theirs = input.dequantized(integers[input.part.integers])
        check, differing[input.part.integers] = input.check(x, theirs)
        if not check.ok:
            raise ExportError(
                f"layer {check.node!r} reads other values in the file than in torch: up to {check.most_steps:.3g} "
                f"quantization steps apart, {check.equal:.2%} equal"
            )
        return torch.from_numpy(theirs).reshape(x.shape).to(x)


class _Input:
    """The input of one layer."""

    def __init__(self, name: str, place: Place, layer: DeployedLayer, part: LayerPart, target: str) -> None:
        self.name, self.place, self.part = name, place, part
        self.layer, self.pattern = layer.layer, layer.input.pattern
        self._pruned = onnxruntime_runner(part.input_model, target)
        self._whole = onnxruntime_runner(part.unpruned_model, target)

    def dequantized(self, integers: Array) -> Array:
        steps = integers.astype(np.int32) - self.part.input_zero.astype(np.int32)
        result: Array = steps.astype(self.part.input_scale.dtype) * self.part.input_scale
        return result

    def check(self, x: Tensor, theirs: Array) -> tuple[LayerCheck, int]:
        """Put `x`, the layer's prepared input, on the grid as the file does, and compare it with the file's input.

        Of two almost equal elements pruning may keep either. So the kept elements of each block are compared in order
        of size, and each element that the file keeps with torch's element in its place.
        """
        feed = {self.part.input: x.detach().reshape(theirs.shape).to(self.part.dtype).numpy()}
        mine = self._pruned(feed)[0]
        differing = int((self._steps(mine, theirs) > HALF).sum())
        if self.pattern is None:
            parts = [self._steps(mine, theirs)]
        else:
            in_place = self._steps(self._whole(feed)[0], theirs)[theirs != 0]
            parts = [in_place, self._steps(self._ordered(mine), self._ordered(theirs))]
        most = max(float(part.max(initial=0)) for part in parts)
        equal = min(float((part <= HALF).mean()) if part.size else 1.0 for part in parts)
        return LayerCheck(self.name, most, equal, True, theirs.size, DIGITS), differing

    def _steps(self, mine: Array, theirs: Array) -> Array:
        steps: Array = np.abs(mine.astype(np.float64) - theirs) / self.part.input_scale
        return steps

    def _ordered(self, x: Array) -> Array:
        assert self.pattern is not None
        last = np.moveaxis(x, self.layer.channel_dim, -1)
        whole = np.pad(last, [(0, 0)] * (x.ndim - 1) + [(0, -last.shape[-1] % self.pattern.block)])
        return np.sort(whole.reshape(*whole.shape[:-1], -1, self.pattern.block))
