"""Small variants of every network and option, for `test_contracts`."""

import re
from typing import Any, NamedTuple

A = "upright.architectures."
GREY, RGB = (1, 28, 28), (3, 32, 32)


class Variant(NamedTuple):
    """A network as a recipe."""

    name: str
    class_path: str
    init_args: dict[str, Any]
    input_shape: tuple[int, int, int]
    slow: bool = False

    @property
    def recipe(self) -> dict[str, Any]:
        return {"class_path": self.class_path, "init_args": self.init_args}


ALEXNET = {"widths": [8, 16, 16, 16, 16], "units": [64, 64], "stem": [3, 1, 1], "dropout": 0.0}
SMALL = {"class_path": A + "lenet.LeNet", "init_args": {"widths": [6, 12, 32, 24], "activation": "relu"}}


def transformer(**options: Any) -> dict[str, Any]:
    return {"class_path": A + "spatial_transformer.SpatialTransformer", "init_args": options}


def around(name: str, network: dict[str, Any] = SMALL, places: tuple[str, ...] = ("input",), **options: Any) -> Variant:
    arguments = {"network": network, "transformer": transformer(**options), "places": list(places)}
    return Variant(f"transformer-{name}", A + "transformer_network.TransformerNetwork", arguments, GREY)


def several(name: str, kind: str, *parts: dict[str, Any]) -> Variant:
    several = {"class_path": A + f"transformer_network.{kind}", "init_args": {"transformers": list(parts)}}
    arguments = {"network": SMALL, "transformer": several}
    return Variant(f"transformer-{name}", A + "transformer_network.TransformerNetwork", arguments, GREY)


NETWORKS = [
    Variant("perceptron", A + "perceptron.Perceptron", {}, GREY),
    Variant("mlp", A + "mlp.MLP", {"widths": [32, 16]}, GREY),
    Variant("mlp-tanh", A + "mlp.MLP", {"widths": [64, 32], "activation": "tanh", "dropout": [0.1, 0.05]}, RGB),
    Variant("mlp-sigmoid", A + "mlp.MLP", {"widths": [32], "activation": "sigmoid"}, GREY),
    Variant("lenet", A + "lenet.LeNet", {}, RGB),
    Variant("lenet-sigmoid-max", A + "lenet.LeNet", {"activation": "sigmoid", "pooling": "max"}, GREY),
    Variant("alexnet", A + "alexnet.AlexNet", ALEXNET, GREY),
    Variant("alexnet-one-tower", A + "alexnet.AlexNet", ALEXNET | {"groups": 1, "local_response_norm": False}, RGB),
    Variant("alexnet-imagenet-stem", A + "alexnet.AlexNet", ALEXNET | {"stem": [11, 4, 2]}, (3, 67, 67)),
    Variant("alexnet-paper-start", A + "alexnet.AlexNet", ALEXNET | {"paper_start": True}, GREY),
    Variant("vgg", A + "vgg.VGG", {"depth": 11, "widths": [8, 12, 16, 16], "units": [32, 32], "dropout": 0.0}, GREY),
    Variant("vgg-13", A + "vgg.VGG", {"depth": 13, "widths": [8, 8, 8, 8], "units": [32, 32], "dropout": 0.0}, GREY),
    Variant(
        "vgg-19", A + "vgg.VGG", {"depth": 19, "widths": [8] * 5, "units": [32, 32], "dropout": 0.0}, RGB, slow=True
    ),
    Variant(
        "vgg-16-batch-norm",
        A + "vgg.VGG",
        {"depth": 16, "widths": [4, 8, 8, 8, 8], "units": [32, 32], "batch_norm": True, "dropout": 0.05},
        RGB,
    ),
    Variant("nin", A + "nin.NiN", {"widths": [8, 16, 16, 16], "dropout": 0.05}, (1, 67, 67)),
    Variant("nin-small", A + "nin.NiN", {"widths": [16, 16, 16], "stem": [5, 1, 2], "dropout": 0.0}, RGB),
    Variant("googlenet", A + "googlenet.GoogLeNet", {"width": 0.15, "dropout": 0.0}, RGB),
    Variant("googlenet-small", A + "googlenet.GoogLeNet", {"stem": [3, 1, 1], "width": 0.15}, (1, 12, 12)),
    Variant("googlenet-batch-norm", A + "googlenet.GoogLeNet", {"batch_norm": True, "width": 0.1}, RGB),
    Variant("inception-v3", A + "inception_v3.InceptionV3", {"width": 0.1}, (3, 75, 75)),
    Variant("inception-v4", A + "inception_v4.InceptionV4", {"width": 0.1, "blocks": [1, 1, 1]}, (3, 75, 75)),
    Variant(
        "inception-resnet-v2",
        A + "inception_resnet.InceptionResNetV2",
        {"width": 0.1, "blocks": [1, 2, 2]},
        (3, 75, 75),
    ),
    Variant("resnet-18", A + "resnet.ResNet", {"widths": [8, 8, 16, 16]}, RGB),
    Variant("resnet-50-small", A + "resnet.ResNet", {"depth": 50, "widths": [4, 4], "stem": "small"}, GREY),
    Variant("resnet-18-plain", A + "resnet.ResNet", {"widths": [8, 16], "shortcuts": False, "stem": "small"}, GREY),
    Variant("resnet-34", A + "resnet.ResNet", {"depth": 34, "widths": [4, 4, 8, 8]}, RGB, slow=True),
    Variant("resnet-101", A + "resnet.ResNet", {"depth": 101, "widths": [8, 8, 16, 16]}, RGB, slow=True),
    Variant("small-resnet-20", A + "resnet.SmallResNet", {"width": 4}, RGB),
    Variant("small-resnet-110", A + "resnet.SmallResNet", {"depth": 110, "width": 4}, RGB, slow=True),
    Variant("small-resnet", A + "resnet.SmallResNet", {"depth": 8, "width": 8}, RGB),
    Variant("small-resnet-plain", A + "resnet.SmallResNet", {"depth": 14, "width": 8, "shortcuts": False}, GREY),
    Variant("polar", A + "polar.PolarNetwork", {"widths": [8, 16], "strides": [2, 2], "angles": 32, "blocks": 1}, RGB),
    Variant("lstm-rows", A + "recurrent.Recurrent", {"hidden": 32}, GREY),
    Variant(
        "gru-columns", A + "recurrent.Recurrent", {"cell": "gru", "order": "columns", "hidden": 32, "layers": 2}, RGB
    ),
    Variant(
        "rnn-rows-bidirectional",
        A + "recurrent.Recurrent",
        {"cell": "rnn", "hidden": 32, "bidirectional": True},
        (1, 12, 12),
    ),
    Variant("lstm-pixels", A + "recurrent.Recurrent", {"order": "pixels", "hidden": 32}, (3, 8, 8)),
]

TRANSFORMERS = [
    around("translation", transform="translation"),
    around("rotation", transform="rotation", padding="border"),
    around("rotation-regressed", transform="rotation", localiser={"class_path": A + "localisers.ConvLocaliser"}),
    around("polar", localiser={"class_path": A + "voting.PolarLocaliser", "init_args": {"kernel": 5, "angles": 24}}),
    around(
        "network",
        localiser={
            "class_path": A + "voting.NetworkLocaliser",
            "init_args": {
                "network": {
                    "class_path": A + "polar.PolarNetwork",
                    "init_args": {"angles": 16, "radii": 6, "widths": [8], "strides": [2], "blocks": 1},
                },
                "turns": 16,
                "size": 24,
                "mask": "disc",
            },
        },
    ),
    around("attention-smaller", transform="attention", output_size=[14, 12]),
    around("similarity-larger", transform="similarity", output_size=[40, 30]),
    around("affine-dense", transform="affine", localiser={"class_path": A + "localisers.DenseLocaliser"}),
    around("projective-reflection", transform="projective", padding="reflection"),
    around("thin-plate", transform="thin_plate", control_points=3),
    around("bicubic", sampling="bicubic"),
    around("nearest", sampling="nearest"),
    around("inside", places=("input", "features.3"), transform="rotation"),
    around(
        "inside-resnet",
        {"class_path": A + "resnet.SmallResNet", "init_args": {"depth": 8, "width": 8}},
        ("blocks.1",),
        transform="affine",
    ),
    around(
        "before-mlp", {"class_path": A + "mlp.MLP", "init_args": {"widths": [32]}}, transform="affine", lr_factor=0.1
    ),
    several("in-series", "SeriesTransformer", transformer(transform="rotation"), transformer(transform="thin_plate")),
    several("stacked", "ParallelTransformer", transformer(transform="affine"), transformer(transform="attention")),
    Variant(
        "transformer-two-networks",
        A + "transformer_network.ParallelNetwork",
        {
            "network": SMALL,
            "transformers": [
                transformer(transform="attention", output_size=[14, 14], start=[-0.69, x, 0.0]) for x in (-0.5, 0.5)
            ],
            "features": 16,
        },
        GREY,
    ),
]

VARIANTS = NETWORKS + TRANSFORMERS

SLOW_TO_EXPORT = re.compile(
    "inception|googlenet$|googlenet-batch|resnet-50|resnet-18-plain|small-resnet-20|vgg-1|nin$|alexnet-i"
    "|alexnet-paper|mlp-|lenet-|lstm-|gru-columns|rnn-rows-b|googlenet-small|resnet-18|small-resnet-plain|nin-small"
    "|transformer-(nearest|bicubic|inside-resnet|two|before|translation|affine-dense|attention-smaller|stacked"
    "|similarity-larger|projective-reflection|network$)|perceptron$|mlp$|vgg$|alexnet-one"
)
"""Variants that are exported in slow tests: their graphs are large, their layers are those of other variants, or
`test_every_config_trains_tests_and_exports` exports them."""
SLOW_TO_LEARN = re.compile(
    "inception-v|googlenet$|googlenet-batch|resnet-50|small-resnet-20|vgg-1|nin$|alexnet-imagenet"
    "|transformer-(inside$|translation|attention-smaller|similarity-larger|bicubic)"
)
"""Variants that learn a batch in slow tests, because this takes long and other variants have the same layers."""

WITHOUT_GRADIENT = {
    # Nearest sampling does not change with small changes of theta.
    "transformer-nearest": r"transformer\.localisation",
    # The next normalisation removes this bias, which the published network has nevertheless.
    "inception-resnet-v2": r"features\.2\.\d+\.expand\.bias",
}
WITHOUT_HEAD = {"polar": "each score has the same weights, whatever their number"}
CANNOT_LEARN = {
    "resnet-101": "with a hundred layers and batches of five, evaluation differs too much from training",
    "alexnet-paper-start": "with a deviation of 0.01, the signal vanishes in a network this narrow",
}
