"""TensorRT, a builder and a runtime of exported files. TensorRT is imported only when it is used."""

from nmcompile.backends.tensorrt.build import build_engine as build_engine
from nmcompile.backends.tensorrt.installed import find_tensorrt as find_tensorrt
from nmcompile.backends.tensorrt.installed import tensorrt_support as tensorrt_support
from nmcompile.backends.tensorrt.layer_report import EngineReport as EngineReport
from nmcompile.backends.tensorrt.layer_report import LayerReport as LayerReport
from nmcompile.backends.tensorrt.runtime import load_engine as load_engine
from nmcompile.backends.tensorrt.torch_module import torch_tensorrt_module as torch_tensorrt_module
