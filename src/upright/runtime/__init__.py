"""Inference with a bundle, on numpy, Pillow and onnxruntime. No module of this package imports torch."""
