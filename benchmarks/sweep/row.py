"""One row of the sweep: the verdicts on an architecture, its shares, and the processor's seconds that it took."""

import time
import warnings
from dataclasses import dataclass, field

from benchmarks.sweep.architecture import Architecture
from benchmarks.sweep.run_modes import check_dense, check_inference, check_training, verdict
from benchmarks.sweep.shares import GROUPS, Group, Shares, shares_of
from nmcompile.report.report import Report

MODES = {"dense": check_dense, "training": check_training, "inference": check_inference}


@dataclass(frozen=True)
class Row:
    """The result of one architecture.

    Args:
        name, library: those of the architecture.
        verdicts: by mode.
        parameters: the number of parameters of all GEMMs; 0 if mode "training" did not compile.
        shares: by group; they add up to 1.
        kinds: the shares of each kind of reason, by group and kind.
        seconds: the processor's time for all three modes.
    """

    name: str
    library: str
    verdicts: dict[str, str]
    parameters: int = 0
    shares: dict[str, float] = field(default_factory=dict)
    kinds: dict[Group, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def is_compiled(self) -> bool:
        """Return whether every mode compiled."""
        return not any(verdict.startswith(("not compiled", "lost")) for verdict in self.verdicts.values())


def run_row(architecture: Architecture) -> Row:
    """Run the three modes of an architecture; an error is a verdict."""
    start, verdicts, shares = time.process_time(), dict[str, str](), Shares(0, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for mode, check in MODES.items():
            verdicts[mode], result = verdict(check, architecture)
            if isinstance(result, Report):
                shares = shares_of(result)
    by_group = {group: shares.of(group) for group in GROUPS}
    kinds = {group: share for group, share in shares.shares.items() if group[1]}
    seconds = time.process_time() - start
    return Row(architecture.name, architecture.library, verdicts, shares.parameters, by_group, kinds, seconds)


def failed_row(architecture: Architecture, reason: str) -> Row:
    """Return the row of an architecture whose process ended without one."""
    return Row(architecture.name, architecture.library, dict.fromkeys(MODES, f"lost: {reason}"))
