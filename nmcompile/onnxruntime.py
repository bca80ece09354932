"""Exported files in ONNX Runtime: a callable model, and native operators for sessions of your own."""

from nmcompile.backends.onnxruntime.custom_operators import register as register
from nmcompile.backends.onnxruntime.isolation import Limits as Limits
from nmcompile.backends.onnxruntime.model import OnnxRuntimeModel as OnnxRuntimeModel
