"""Binding of each layer's three graphs to a model: its masks, shared like the weights, and its random stream."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nmcompile.config import CompileConfig, Phase
from nmcompile.errors import ConfigError
from nmcompile.ir.captured import Site
from nmcompile.ir.plan import LayerPlan, PlanRow
from nmcompile.ir.program import Program
from nmcompile.pruning.pattern import NMPattern
from nmcompile.three_gemm.draw_stream import DrawStream, Replicas
from nmcompile.three_gemm.grid_steps import ActivationStep, GridSteps
from nmcompile.three_gemm.triple import GemmTriple
from nmcompile.training.earlier import Earlier
from nmcompile.training.masks import WeightMask
from nmcompile.training.weight_clock import HOLDS, WRITTEN


class TripleFactory:
    """A factory of the running forms of planned layers; it does not change the model.

    Args:
        model: the module tree that the layers will run in.
        program: with its graphs lowered.
        config: refresh period and SR-STE.
        seed: seed of every random stream.
        earlier: state of an earlier compilation; a mask that meets the new pattern and a clip of the same grid are
            taken over.
    """

    def __init__(self, model: nn.Module, program: Program, config: CompileConfig, seed: int, earlier: Earlier) -> None:
        self.model = model
        self.program = program
        self.config = config
        self.seed = seed
        self.earlier = earlier
        self.masks: dict[int | str, WeightMask] = {}
        self.replicas = Replicas()
        self.streams: dict[tuple[str, ...], ActivationStep] = {}

    def rewritten_sites(self) -> Iterator[Site]:
        """Return the sites that the plan rewrites."""
        rewritten = {plan.layer.name for plan in self.program.plan if plan.rewritten}
        return (site for site in self.program.captured.sites if site.layer.name in rewritten)

    def make(self, site: Site) -> GemmTriple:
        """Make the running form of one site.

        Raises:
            ConfigError: another layer shares the weight and asks for another mask.
        """
        graphs = self.program.layers[site.layer.name]
        row = graphs.plan.find(Phase.FORWARD, "weight")
        mask = self._mask(site, row) if row else None
        stream = DrawStream(self.seed, site.layer.name, self.replicas)
        stream.move(self._device(site))
        return GemmTriple(graphs, site, mask, stream, self._steps(site, graphs.plan))

    def _steps(self, site: Site, plan: LayerPlan) -> GridSteps:
        weight = plan.grid_row("weight")
        grid, rounded = weight.grid if weight else None, self.earlier.weight_steps.get(site.layer.name)
        is_same = rounded is not None and rounded[0] == grid
        return GridSteps(
            grid,
            site.layer.out_dim if weight is not None and weight.axis == "out" else None,
            rounded[1] if rounded is not None and is_same else None,
            self._activation_step(site, plan.grid_row("input")),
            self._activation_step(site, plan.grid_row("output")),
            None if is_same else rounded,
        )

    def _activation_step(self, site: Site, row: PlanRow | None) -> ActivationStep | None:
        if row is None:
            return None
        if row.stream in self.streams:
            return self.streams[row.stream]
        step = ActivationStep(site.layer.name, row, self._device(site))
        if row.stream:
            self.streams[row.stream] = step
        earlier = self.earlier.steps.get((site.layer.name, row.operand))
        if earlier is not None and earlier.is_calibrated and earlier.grid == step.grid:
            step.calibrate(earlier.clip)
        return step

    def _device(self, site: Site) -> torch.device:
        modules = self.model.get_submodule(site.module), self.model
        return next((p.device for module in modules for p in module.parameters()), torch.device("cpu"))

    def _mask(self, site: Site, row: PlanRow) -> WeightMask:
        weight = None if site.is_expression else _find(self.model, site.weight)
        key = site.layer.name if weight is None else id(weight)
        if key not in self.masks:
            self.masks[key] = self._new_mask(site, row, weight)
        mask = self.masks[key]
        fits = mask.layer.in_dim == site.layer.in_dim or row.is_transposable
        if (mask.operator, mask.pattern) != (row.operator, row.pattern) or not fits:
            raise ConfigError(
                f"layers {mask.layer.name!r} and {site.layer.name!r} share one weight, but are to be pruned as "
                f"{mask.pattern} {mask.operator} and {row.pattern} {row.operator}; give both the same in "
                "CompileConfig.layers"
            )
        owner = self.model.get_submodule(site.module)
        inside = not site.module or site.weight.startswith(f"{site.module}.")
        path = site.weight.removeprefix(f"{site.module}.") if site.module else site.weight
        mask.owners[owner if inside else self.model] = None if weight is None else path if inside else site.weight
        mask.accept_version(mask.clock.content)
        return mask

    def _new_mask(self, site: Site, row: PlanRow, weight: Tensor | None) -> WeightMask:
        assert row.operator is not None and row.pattern is not None
        if weight is None:
            weight = torch.empty(site.layer.weight_shape, device=self._device(site))
        config = self.config
        kernel = self.program.layers[site.layer.name].mask_kernel()
        mask = WeightMask(
            site.weight, site.layer, row.operator, row.pattern, config.refresh, config.sr_ste, weight, kernel
        )
        earlier = self.earlier.masks.get(site.weight)
        if (
            earlier is not None
            and (earlier.found or earlier.clock.staleness != WRITTEN)
            and _meets(earlier.tensor, mask)
        ):
            mask.tensor.copy_(earlier.tensor)
            mask.steps, mask.found = earlier.steps, earlier.found
            mask.clock.staleness = earlier.clock.staleness if earlier.is_stale else HOLDS
            mask.clock.content = earlier.clock.content
        return mask


def _find(model: nn.Module, name: str) -> Tensor:
    module, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(module), attribute)
    return tensor


def _meets(kept: Tensor, mask: WeightMask) -> bool:
    """Return whether a mask obeys another's pattern: N:M along in, and also along out if that is transposable."""
    if kept.shape != mask.tensor.shape:
        return False
    layer = mask.layer
    dims = [layer.in_dim] + ([layer.out_dim] if mask.is_transposable else [])
    return all(count_violations(kept, mask.pattern, dim) == 0 for dim in dims)


def count_violations(x: Tensor, pattern: NMPattern, dim: int) -> int:
    """Count the blocks along `dim` that hold more than N non-zeros; an incomplete last block counts as one."""
    line = (x != 0).movedim(dim, -1)
    count = line.shape[-1] // pattern.block
    whole, rest = line.split((count * pattern.block, line.shape[-1] % pattern.block), dim=-1)
    parts = whole.unflatten(-1, (count, pattern.block)).sum(-1), rest.sum(-1)
    return sum(int((kept > pattern.n_keep).sum()) for kept in parts)
