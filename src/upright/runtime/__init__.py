"""Inference with a bundle, by NumPy, Pillow and onnxruntime. No module of this package imports torch."""
