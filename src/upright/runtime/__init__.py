"""Bundle -> answers, on numpy, Pillow and onnxruntime alone: nothing here imports torch."""
