"""The peak of a process's resident memory between two moments, where Linux counts it."""

from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
OF_PEAK = "5"  # resets the peak to what is resident now


def reset_peak() -> None:
    if RESET.exists():
        RESET.write_text(OF_PEAK)


def peak() -> int | None:
    """Return the largest resident set in bytes since `reset_peak`, or None if it is not counted."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
