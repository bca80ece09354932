"""TensorRT's messages during a build.

TensorRT keeps the first logger that a process gives it and ignores every later one. So there is one logger for the
process, and each build takes its own messages from it.
"""

import functools
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import tensorrt

LOGGER = logging.getLogger("nmcompile.tensorrt")
LEVELS = {
    "INTERNAL_ERROR": logging.ERROR,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.DEBUG,  # TensorRT's INFO is hundreds of lines per build
    "VERBOSE": logging.DEBUG,
}
TROUBLE = {"INTERNAL_ERROR", "ERROR", "WARNING"}


class BuildLog:
    """Messages of one build: `lines` of all severities, `troubles` of warnings and errors."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.troubles: list[str] = []

    def add(self, severity: str, message: str) -> None:
        self.lines.append(message)
        if severity in TROUBLE:
            self.troubles.append(message)

    def last_troubles(self, count: int = 3) -> str:
        return "; ".join(self.troubles[-count:]) or "TensorRT gave no reason"


class Logger(Protocol):
    """TensorRT's logger, with the log of the build that is under way."""

    build_log: BuildLog | None


@contextmanager
def recorded(trt: ModuleType) -> Iterator[tuple[Logger, BuildLog]]:
    """Yield TensorRT's logger, and the log that it fills meanwhile; builds in several threads wait for each other."""
    logger, lock = _process_logger(trt)
    with lock:
        log = logger.build_log = BuildLog()
        try:
            yield logger, log
        finally:
            logger.build_log = None


@functools.cache
def _process_logger(trt: ModuleType) -> tuple[Logger, threading.Lock]:
    class ProcessLogger(trt.ILogger):  # type: ignore[misc, name-defined]
        build_log: BuildLog | None = None

        def log(self, severity: "tensorrt.ILogger.Severity", message: str) -> None:
            if self.build_log is not None:
                self.build_log.add(severity.name, message)
            LOGGER.log(LEVELS[severity.name], message)

    return ProcessLogger(), threading.Lock()
