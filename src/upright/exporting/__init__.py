"""Checkpoint -> verified ONNX bundle."""
