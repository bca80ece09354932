"""The measured step of a model, dense and pruned: where the time goes, the largest loss, and what to do about it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from nmcompile.api.step_parts import Parts
from nmcompile.printable import printable, table
from nmcompile.report.report import Report

SCHEMA_VERSION = 1
DENSE, ALL, PAYS = "dense", "all", "pays"
PRUNED_GEMM = 0.5  # × the time of a dense GEMM, at which a 2:4 one would run at best
SMALLEST_LOSS = 0.02  # × the dense step; less is noise
NAMES = {
    "gemm": "GEMM",
    "pruning": "pruning",
    "masks": "masks",
    "others": "other operators",
    "python": "Python, dispatch",
}
ADVICE = {
    "gemm": "sparse kernels gain less than masks and fused pruning cost in them; take a larger batch or wider layers, "
    "and CompileConfig(where='pays') leaves those dense that lose",
    "pruning": "CompileConfig(where='pays') leaves the phases dense whose pruning costs more than it gains; "
    "a larger batch and wider layers make GEMMs grow faster than pruning",
    "masks": "rebuild masks less often: CompileConfig(refresh=40)",
    "others": "torch.compile the compiled model: it fuses operators and copies less",
    "python": "torch.compile the compiled model, or take a larger batch; on a GPU nmcompile.training.graphed_step",
}


@dataclass(frozen=True)
class BenchReport:
    """Parts of a step of the dense model, of `where="all"` and of `where="pays"`, timed in turns.

    Args:
        model_name, mode: as in the report.
        step: what a step does, `"forward, backward and optimizer"`.
        setting: the device, the threads and the version of PyTorch.
        parts: by variant.
        report: the report on the faster pruned variant, which knows the time of the whole step.
    """

    model_name: str
    mode: str
    step: str
    setting: Mapping[str, str | int]
    parts: Mapping[str, Parts]
    report: Report = field(repr=False)

    @property
    def speedup(self) -> dict[str, float]:
        """Return dense time / time of each pruned variant."""
        return {name: self.parts[DENSE].total / self.parts[name].total for name in (ALL, PAYS)}

    @property
    def loss(self) -> tuple[str, float] | None:
        """Return the part in which a step with everything pruned takes longer than dense, and by how many seconds."""
        more = {name: self.parts[ALL][place] - self.parts[DENSE][place] for place, name in enumerate(Parts._fields)}
        part = max(more, key=more.__getitem__)
        return (part, more[part]) if more[part] > SMALLEST_LOSS * self.parts[DENSE].total else None

    @property
    def advice(self) -> str:
        """Return the largest loss and what to do, in one sentence."""
        if self.loss is None:
            return f"No part of the pruned step takes longer than in the dense one; {self._bound()}."
        part, more = self.loss
        return f"With everything pruned the largest loss is {NAMES[part]}, {more * 1e3:.3g} ms more: {ADVICE[part]}."

    def _bound(self) -> str:
        dense = self.parts[DENSE]
        most = dense.total / (dense.total - dense.gemm * (1 - PRUNED_GEMM))
        return f"GEMMs are {dense.gemm / dense.total:.0%} of it, which bounds the gain of 2:4 at {most:.2f} ×"

    def __str__(self) -> str:
        gains = ", ".join(f"{name} {gain:.2f} ×" for name, gain in self.speedup.items())
        setting = ", ".join(f"{key} {value}" for key, value in self.setting.items())
        rows = [[name, parts.total * 1e3, *(one * 1e3 for one in parts)] for name, parts in self.parts.items()]
        shown = table(rows, ["ms", "step", *NAMES.values()], floatfmt=".2f")
        head = f"{printable(self.model_name)}, mode {self.mode!r}, {self.step} ({setting})"
        return f"{head}\n\nwhole step: {gains} as fast as dense\n\n{shown}\n\n{self.advice}"

    def to_json(self) -> str:
        """Return versioned JSON; times are in seconds."""
        loss = None if self.loss is None else {"part": self.loss[0], "seconds": self.loss[1]}
        return json.dumps(
            {
                "schema_version": SCHEMA_VERSION,
                "model": self.model_name,
                "mode": self.mode,
                "step": self.step,
                "setting": dict(self.setting),
                "seconds": {name: parts.total for name, parts in self.parts.items()},
                "parts": {name: parts._asdict() for name, parts in self.parts.items()},
                "speedup": self.speedup,
                "loss": loss,
                "advice": self.advice,
            },
            indent=2,
        )
