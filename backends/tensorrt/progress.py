"""TensorRT's build progress as bars on a terminal."""

import threading
from types import ModuleType
from typing import NoReturn, Protocol

from tqdm import tqdm


class ProgressMonitor(Protocol):
    """An `IProgressMonitor` of TensorRT that tells whether Ctrl-C has stopped the build."""

    interrupted: bool

    def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
        """Open a bar."""

    def step_complete(self, phase: str, step: int) -> bool:
        """Move a bar on; False stops the build."""

    def phase_finish(self, phase: str) -> None:
        """Close a bar."""


def progress_monitor(trt: ModuleType) -> ProgressMonitor:
    """Make an `IProgressMonitor` with one bar per phase, nested like the phases; no bars unless stderr is a terminal.

    After Ctrl-C it stops the build, and its `interrupted` is set.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.interrupted = False
            self.bars: dict[str, tqdm[NoReturn]] = {}
            self.lock = threading.Lock()  # several of TensorRT's threads report

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            with self.lock:
                self.bars[phase] = tqdm(desc=phase, total=steps, leave=parent is None, disable=None)

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                with self.lock:
                    self.bars[phase].update(step + 1 - self.bars[phase].n)
            except KeyboardInterrupt:  # raised here, as the build itself runs outside of Python
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase: str) -> None:
            with self.lock:
                self.bars.pop(phase).close()

    return Monitor()
