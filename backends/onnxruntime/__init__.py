"""ONNX Runtime, a runtime of exported files."""

from nmcompile.backends.onnxruntime.isolation import Limits as Limits
from nmcompile.backends.onnxruntime.model import OnnxRuntimeModel as OnnxRuntimeModel
