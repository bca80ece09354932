"""From a deployable module to an ONNX file."""
