"""Export of a checkpoint to a verified ONNX bundle."""
