"""Knows ONNX; knows no explanation method."""
