"""Upright: from images to a verified ONNX bundle, through any architecture and a spatial transformer around it.

The map, in the order of the imports (each part knows only those above it):

    errors        what a user did wrong, in one line
    files         written whole, or not at all
    recipes       a class and its arguments as plain data, and back
    images        ImageSpec, and decoding any picture to uint8               (numpy, Pillow)
    runtime       bundle -> answers: verify, infer, Predictor                (numpy, Pillow, onnxruntime)
    warp          sampling points, transforms, resizing                      (torch, as all that follows)
    anatomy       what a network is made of, layer by layer
    architectures one network per file; knows nothing of images or training
    data          source -> splits -> batches; augmentation
    training      ImageClassifier, checkpoints, fit / validate / test / predict
    describe      the anatomy of a config's or a checkpoint's network, printed
    exporting     checkpoint -> verified bundle
    evidence      studies: one textbook claim each, measured
    cli, demo     the verbs, and the verbs one after the other
"""

import os

# Since 1.29 onnxruntime tells Microsoft of every session, the file's name included, unless this is set before it
# starts; ORT_DISABLE_TELEMETRY=0 lets it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
