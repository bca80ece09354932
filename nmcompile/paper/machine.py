"""The software and the machine of a run."""

import platform
import subprocess
from pathlib import Path

import torch

import nmcompile

ROOT = Path(__file__).parents[2]


def machine() -> dict[str, str | int]:
    """Return the versions, the processor, its threads, and the commit of a checkout."""
    versions = {"nmcompile": nmcompile.__version__, "torch": torch.__version__, "python": platform.python_version()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {**versions, "device": device, "threads": torch.get_num_threads(), "commit": commit()}


def processor() -> str:
    """Return the name of the processor, with family and model where Linux tells them."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in fields:
        return platform.processor()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


def commit() -> str:
    """Return the commit of the checkout that this code runs from, with `-dirty` if it was changed; else ""."""
    if not (ROOT / ".git").exists():
        return ""
    command = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
