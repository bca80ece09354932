"""Facts about a plan, in a JSON file beside it.

A plan holds native code that TensorRT runs unchecked. So a plan is loaded only if it is, bit for bit, the one that its
sidecar was written for, and only with the TensorRT and the GPU that it was built for.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from nmcompile.checks import described
from nmcompile.errors import FileError
from nmcompile.files.read_files import parse_json, read_record, read_regular
from nmcompile.files.write_atomically import sha256, write_together

LARGEST = 2**20  # bytes
LARGEST_PLAN = 2**33
VERSION = 1


@dataclass(frozen=True)
class Sidecar:
    """Record of what a plan was built from and with.

    Attributes:
        flavour: the module, "tensorrt" or "tensorrt_rtx".
        version: version of that module; other versions cannot load the plan.
        gpu: the GPU that it was built on; None if there was none.
        sparse: whether sparse tactics were allowed.
        shapes: smallest, typical and largest shape of every input.
        plan_bytes: size of the plan.
        plan_sha256: hash of the plan.
        onnx_sha256: hash of the ONNX file; weights in files beside it are not in it.
    """

    flavour: str
    version: str
    gpu: str | None
    sparse: bool
    shapes: dict[str, list[list[int]]]
    plan_bytes: int
    plan_sha256: str
    onnx_sha256: str


def sidecar_path(plan: Path) -> Path:
    return plan.with_name(plan.name + ".json")


def write_plan(path: Path, plan: bytes, sidecar: Sidecar) -> None:
    """Write both files. Between the two renames the pair does not match and is refused."""
    document = json.dumps({"format": VERSION, **asdict(sidecar)}, indent=1)
    write_together({path: plan, sidecar_path(path): document.encode()})


def read_plan(path: Path, pinned: str | None = None) -> tuple[bytes, Sidecar]:
    """Return a plan that matches its sidecar, and the sidecar.

    Args:
        path: path of the plan.
        pinned: its SHA-256 from elsewhere: whoever can replace the plan can replace the sidecar too.

    Raises:
        FileError: a file is missing or damaged, or the two do not belong together.
    """
    sidecar = _read_sidecar(sidecar_path(path))
    plan = read_regular(path, sidecar.plan_bytes)
    if len(plan) != sidecar.plan_bytes:
        raise FileError(f"{path}: {len(plan)} bytes, its sidecar says {sidecar.plan_bytes}; truncated? build it again")
    if sha256(plan) != sidecar.plan_sha256:
        raise FileError(f"{path}: not the plan that its sidecar was written for, so it is not loaded; build it again")
    if pinned not in (None, sidecar.plan_sha256):
        raise FileError(f"{path}: its SHA-256 is {sidecar.plan_sha256}, not {pinned}, so it is not loaded")
    return plan, sidecar


def _read_sidecar(path: Path) -> Sidecar:
    document = parse_json(read_regular(path, LARGEST), str(path))
    version = document.pop("format", None) if isinstance(document, dict) else None
    if version != VERSION:
        raise FileError(f"{path}: sidecar format {described(version)}; this nmcompile reads {VERSION}")
    sidecar = read_record(Sidecar, document, str(path))
    if not 0 <= sidecar.plan_bytes <= LARGEST_PLAN:
        raise FileError(f"{path}: a plan of {sidecar.plan_bytes} bytes; at most {LARGEST_PLAN} are read")
    return sidecar
