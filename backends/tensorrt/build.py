"""Building of a TensorRT plan from an exported ONNX file.

TensorRT compiles and runs whole files. It is not a `Backend` of the three graphs: it lowers no node, and `compile`
never picks it.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from nmcompile.backends.tensorrt.build_log import BuildLog, Logger, recorded
from nmcompile.backends.tensorrt.engine_layers import EngineLayer, layers_from_json, layers_from_log
from nmcompile.backends.tensorrt.installed import find_tensorrt, gpu_name
from nmcompile.backends.tensorrt.layer_report import EngineReport, explain
from nmcompile.backends.tensorrt.progress import progress_monitor
from nmcompile.backends.tensorrt.sidecar import Sidecar, write_plan
from nmcompile.backends.tensorrt.sparsity_log import parse_sparsity
from nmcompile.errors import BackendUnavailable, ConfigError, LoweringError
from nmcompile.files.onnx_rules import check_runnable
from nmcompile.files.open_onnx import OnnxFile, open_onnx
from nmcompile.files.read_files import read_regular
from nmcompile.files.read_weights import read_weights
from nmcompile.files.write_atomically import sha256, write_atomically

if TYPE_CHECKING:
    import tensorrt

LARGEST_CACHE = 2**30  # bytes

Batch = tuple[int, int, int]
Shapes = dict[str, list[list[int]]]  # smallest, typical and largest shape of every input


def build_engine(
    onnx_path: str | os.PathLike[str],
    engine_path: str | os.PathLike[str],
    *,
    batch: Batch = (1, 8, 32),
    sparse: bool = True,
    timing_cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> EngineReport:
    """Build a plan and its sidecar, and report which layers got sparse tactics and why the others did not.

    The network is strongly typed: the file's own types and Q/DQ nodes decide every precision.

    Args:
        onnx_path: checked as untrusted.
        engine_path: path of the plan; its sidecar has the same name with `.json` added.
        batch: smallest, typical and largest size of a dynamic first dimension; TensorRT tunes for the typical one.
        sparse: whether tactics for 2:4 weights may be chosen; TensorRT chooses them where they are faster.
        timing_cache: a file of earlier measurements, used and updated.
        progress: show bars on a terminal.

    Raises:
        BackendUnavailable: no TensorRT, or one without sparse tactics.
        FileError: a damaged or hostile ONNX file.
        LoweringError: TensorRT refuses a node, or builds no plan.
        ConfigError: a `batch` that is not ordered.
    """
    if not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise ConfigError(f"batch {batch}: expected 1 <= smallest <= typical <= largest")
    trt = find_tensorrt()
    model = open_onnx(onnx_path)
    check_runnable(model)
    cache = Path(timing_cache) if timing_cache is not None else None
    with recorded(trt) as (logger, log):
        plan, shapes = _Build(trt, logger, log, model).plan(batch, sparse, cache, progress)
        layers = _engine_layers(trt, logger, log, plan)
    sidecar = Sidecar(
        flavour=trt.__name__,
        version=trt.__version__,
        gpu=gpu_name(),
        sparse=sparse,
        shapes=shapes,
        plan_bytes=len(plan),
        plan_sha256=sha256(plan),
        onnx_sha256=sha256(model.content),
    )
    write_plan(Path(engine_path), plan, sidecar)
    rows = explain(read_weights(model), layers, parse_sparsity(log.lines), sparse)
    return EngineReport(Path(engine_path), sidecar, tuple(rows))


@dataclass(frozen=True)
class _Build:
    """The objects of one build; TensorRT needs them alive until its end."""

    trt: ModuleType
    logger: Logger
    log: BuildLog
    model: OnnxFile

    def plan(self, batch: Batch, sparse: bool, cache: Path | None, progress: bool) -> tuple[bytes, Shapes]:
        """Return the plan, and the shapes that it takes."""
        builder = self.trt.Builder(self.logger)
        network = builder.create_network(1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = self._parse(network)
        shapes = {x.name: _shapes(x, batch) for x in (network.get_input(i) for i in range(network.num_inputs))}
        config = self._config(builder, shapes, sparse)
        if cache is not None:
            config.set_timing_cache(config.create_timing_cache(_content(cache)), ignore_mismatch=False)
        monitor = progress_monitor(self.trt) if progress else None
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
        del parser  # kept until here: it holds the weights that the network points to
        if monitor is not None and monitor.interrupted:
            raise KeyboardInterrupt
        if plan is None:
            raise LoweringError(f"{self.model.name}: TensorRT built no plan: {self.log.last_troubles()}")
        if cache is not None:
            write_atomically(cache, bytes(config.get_timing_cache().serialize()))
        return bytes(plan), shapes

    def _config(self, builder: "tensorrt.Builder", shapes: Shapes, sparse: bool) -> "tensorrt.IBuilderConfig":
        config = builder.create_builder_config()
        config.profiling_verbosity = self.trt.ProfilingVerbosity.DETAILED
        if sparse:
            config.set_flag(_sparse_flag(self.trt))
        profile = builder.create_optimization_profile()
        for name, sizes in shapes.items():
            profile.set_shape(name, *sizes)
        config.add_optimization_profile(profile)
        return config

    def _parse(self, network: "tensorrt.INetworkDefinition") -> "tensorrt.OnnxParser":
        parser = self.trt.OnnxParser(network, self.logger)
        path = self.model.path
        parsed = parser.parse(self.model.content) if path is None else parser.parse_from_file(str(path))
        if not parsed:
            errors = [_described(parser.get_error(index)) for index in range(parser.num_errors)]
            reason = "; ".join(errors) or self.log.last_troubles()
            raise LoweringError(f"{self.model.name}: TensorRT's parser refuses it: {reason}")
        return parser


def _described(error: "tensorrt.ParserError") -> str:
    where = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node() >= 0 else ""
    return f"{where}{error.desc()} [{error.code().name}]"


def _shapes(tensor: "tensorrt.ITensor", batch: Batch) -> list[list[int]]:
    shape = list(tensor.shape)
    if -1 in shape[1:]:
        raise LoweringError(
            f"input {tensor.name!r} has shape {shape}: only the first dimension may be dynamic; "
            "export the model with the others fixed"
        )
    return [[size if first == -1 else first for first in shape[:1]] + shape[1:] for size in batch]


def _sparse_flag(trt: ModuleType) -> "tensorrt.BuilderFlag":
    if not hasattr(trt.BuilderFlag, "SPARSE_WEIGHTS"):
        raise BackendUnavailable(f"{trt.__name__} has no sparse tactics; install tensorrt, or build with sparse=False")
    return trt.BuilderFlag.SPARSE_WEIGHTS


def _content(path: Path) -> bytes:
    return read_regular(path, LARGEST_CACHE) if path.exists() else b""


def _engine_layers(trt: ModuleType, logger: Logger, log: BuildLog, plan: bytes) -> tuple[EngineLayer, ...]:
    """Read the layers from the plan if a GPU can load it, else from the listing at the end of the log."""
    if gpu_name() is None:
        return layers_from_log(log.lines)
    inspector = trt.Runtime(logger).deserialize_cuda_engine(plan).create_engine_inspector()
    return layers_from_json(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
