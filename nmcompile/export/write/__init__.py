"""Writing of a deployable module as an ONNX file."""
