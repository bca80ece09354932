"""The ONNX writer, and the checks of its files."""

from nmcompile.export.check.example import Example as Example
from nmcompile.export.check.verify_onnx import Verification as Verification
from nmcompile.export.check.verify_onnx import verify_onnx as verify_onnx
from nmcompile.export.planned_patterns import weights_table as weights_table
from nmcompile.export.write.save_model import staged_model as staged_model
from nmcompile.export.write.write_onnx import ExportedNode as ExportedNode
from nmcompile.export.write.write_onnx import OnnxReport as OnnxReport
from nmcompile.export.write.write_onnx import check_options as check_options
from nmcompile.export.write.write_onnx import write_onnx as write_onnx
