"""A foreign ONNX classifier: its preprocessing, its scores and its classes."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from upright.errors import EngineError, UserError, one_line
from upright.exporting.graph import check_weights
from upright.exporting.precision import TOLERANCES
from upright.files import check_exists
from upright.images import ImageSpec
from upright.options import Attach
from upright.runtime.bundle import MANIFEST
from upright.runtime.predictor import fixed_batch, open_session
from upright.warp import Rule, resize

Layout = Literal["nchw", "nhwc"]
Outputs = dict[str, npt.NDArray[Any]]

DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}
"""Type of the input by onnxruntime's name."""
AXES: dict[Layout, tuple[int, int, int]] = {"nchw": (1, 2, 3), "nhwc": (3, 1, 2)}
"""Axes of channels, height and width."""
RANGES = {"unit": (1.0, 0.0), "byte": (255.0, 0.0), "signed": (2.0, -1.0)}
"""Factor and offset that map grey levels on the scale of 0 to 1 to each range."""
HALF = 0.502
"""Added before grey levels are rounded down. Ties go up, also those that a rounding error puts just below."""
TIMM_CROPS: dict[str, Rule] = {"center": "crop", "squash": "stretch"}
"""Resize rule by timm's ``crop_mode``."""
BILINEAR = 2
"""Pillow's number of the filter in ``preprocessor_config.json``."""


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing in front of a foreign model, from RGB or grey values 0 to 255 to its input.

    Args:
        spec: size, resize rule, mean and standard deviation on the scale of 0 to 1, and classes.
        crop: side of the centre that remains of the resized image, as a share; the margins are cut off.
        channels: order of the colours.
        layout: order of the axes.
        dtype: ``float32``, ``float16`` or ``uint8``.
    """

    spec: ImageSpec
    crop: float
    channels: Literal["rgb", "bgr"]
    layout: Layout
    dtype: str

    @property
    def enlarged(self) -> tuple[int, int]:
        """Height and width before the margins are cut off; the margins are of equal size."""
        height, width = (side + 2 * round(side * (1 / self.crop - 1) / 2) for side in self.spec.input_shape[1:])
        return height, width

    def fit(self, images: Tensor) -> Tensor:
        """Resize images ``(B, C, h, w)``, values 0 to 255, to the size of the input."""
        (height, width), (_, *size) = self.enlarged, self.spec.input_shape
        rule = cast(Rule, self.spec.resize)
        resized = resize(images, height, width, rule, self.spec.background)
        y, x = (height - size[0]) // 2, (width - size[1]) // 2
        return resized[..., y : y + size[0], x : x + size[1]]

    def convert(self, fitted: Tensor) -> npt.NDArray[Any]:
        """Convert images of the input's size ``(B, C, H, W)``, values 0 to 255, to the input."""
        if self.channels == "bgr":
            fitted = fitted.flip(1)
        if self.dtype == "uint8":
            values = (fitted + HALF).floor().clamp(0, 255)
        else:
            mean, std = (255 * torch.tensor(each)[:, None, None] for each in (self.spec.mean, self.spec.std))
            values = (fitted - mean) / std
        return (values if self.layout == "nchw" else values.permute(0, 2, 3, 1)).numpy().astype(self.dtype)


class Foreign:
    """A foreign classifier and its preprocessing.

    Args:
        options: path of the model, and the parts of the preprocessing that it does not record.
        channels: number of channels of the images.

    Raises:
        UserError: if the model cannot be used, or its preprocessing is not known.
    """

    def __init__(self, options: Attach, channels: int) -> None:
        check_exists(path := Path(options.model), "an ONNX file")
        self.path, self.name = path, f"'{path}'"
        try:
            self.proto = onnx.load(path)
        except Exception as error:  # a damaged file can lead protobuf to any exception; external data may be missing
            raise UserError(f"{self.name} cannot be read as ONNX: {one_line(error)}.") from None
        check_weights(sum(len(each.raw_data) for each in self.proto.graph.initializer), self.name)
        self.session = open_session(path)
        inputs = self.session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in DTYPES:
            ends = ", ".join(f"{each.name} {each.type} {each.shape}" for each in inputs)
            raise UserError(f"{self.name} must have one input of four axes, of {', '.join(DTYPES)}; it has {ends}.")
        self.input, self.batch = inputs[0], fixed_batch(self.session)
        self.output_names = [output.name for output in self.session.get_outputs()]
        metadata = {entry.key for entry in self.proto.metadata_props}
        records = read_records(path, is_upright="upright" in metadata)
        self.preprocessing = self._preprocessing(options, records, channels)
        outputs = self(torch.zeros(1, *self.preprocessing.spec.input_shape))
        self.scores = self._find_scores(outputs, options.output)
        classes = self._classes(options, records, outputs[self.scores].shape[1])
        self.preprocessing = replace(self.preprocessing, spec=replace(self.preprocessing.spec, classes=classes))

    def __call__(self, fitted: Tensor) -> Outputs:
        """Return all outputs for images of the input's size ``(B, C, H, W)``, values 0 to 255."""
        values = self.preprocessing.convert(fitted)
        step = self.batch or len(values)
        parts = []
        for start in range(0, len(values), step):
            part = values[start : start + step]
            filled = part[np.arange(step) % len(part)]
            try:
                results = self.session.run(self.output_names, {self.input.name: filled})
            except Exception as error:  # onnxruntime's exceptions have no other common base
                reason = one_line(error)
                raise EngineError(f"onnxruntime failed on {self.name} with {filled.shape}: {reason}") from error
            for name, result in zip(self.output_names, results, strict=True):
                if not isinstance(result, np.ndarray) or result.shape[:1] != (step,):
                    raise UserError(f"Output '{name}' of {self.name} must be a tensor with one row per image.")
            parts.append([result[: len(part)] for result in results])
        return dict(zip(self.output_names, map(np.concatenate, zip(*parts, strict=True)), strict=True))

    @property
    def spec(self) -> ImageSpec:
        """Size, resize rule and classes of the model."""
        return self.preprocessing.spec

    @cached_property
    def tolerance(self) -> float:
        """Largest difference of a probability between two machines, see `TOLERANCES`."""
        quantized = any("Quantize" in node.op_type or "Integer" in node.op_type for node in self.proto.graph.node)
        half = any(each.data_type == onnx.TensorProto.FLOAT16 for each in self.proto.graph.initializer)
        dtype = self.preprocessing.dtype
        return TOLERANCES["int8" if quantized or dtype == "uint8" else "fp16" if half or dtype == "float16" else "fp32"]

    def _preprocessing(self, options: Attach, records: dict[str, Any], channels: int) -> Preprocessing:
        """Complete the options by the input of the model, then by the records."""
        given = {name: value for name, value in vars(options).items() if value is not None}
        values = given.keys() & {"mean", "std", "range"}
        if DTYPES[self.input.type] == "uint8":
            if values:
                raise UserError(f"{self.name} takes uint8, so --mean, --std and --range have no effect; omit them.")
            records = records | {"mean": None, "std": None, "range": "byte"}
        elif values:
            records = records | {"mean": None, "std": None, "range": None}
        if options.resize:
            records = records | {"crop": 1.0}
        layout, size = self._find_axes(options, channels)
        settings: dict[str, Any] = {
            "crop": 1.0,
            "channels": "rgb",
            **records,
            **({"size": size} if size else {}),
            **given,
        }
        mean, std, unit = (settings.get(name) for name in ("mean", "std", "range"))
        missing = {
            "--layout nchw or nhwc": layout is None,
            "--size HxW": "size" not in settings,
            "--resize stretch, crop or pad": "resize" not in settings,
            "--mean and --std, or --range unit, byte or signed": not (mean or std or unit),
        }
        if any(missing.values()):
            needed = "; ".join(name for name, is_missing in missing.items() if is_missing)
            raise UserError(f"{self.name} does not record its preprocessing. Give {needed}.")
        assert layout
        factor, offset = RANGES[unit or "unit"]
        height, width = settings["size"]
        spec = ImageSpec(
            channels,
            height,
            width,
            classes=(),
            mean=tuple((value - offset) / factor for value in _per_channel("--mean", mean or (0.0,), channels)),
            std=tuple(value / factor for value in _per_channel("--std", std or (1.0,), channels)),
            resize=settings["resize"],
            background=settings.get("background", 0),
        )
        return Preprocessing(spec, settings["crop"], settings["channels"], layout, DTYPES[self.input.type])

    def _find_axes(self, options: Attach, channels: int) -> tuple[Layout | None, tuple[int, int] | None]:
        """Return the layout, and the size that the model takes; None for what its input leaves open."""
        shape = self.input.shape
        fitting = [layout for layout, (axis, *_) in AXES.items() if shape[axis] == channels]
        layout = options.layout or (fitting[0] if len(fitting) == 1 else None)
        count, *size = (shape[axis] for axis in AXES[layout or "nchw"])
        is_fixed = all(isinstance(length, int) for length in shape[1:])
        if (layout and isinstance(count, int) and count != channels) or (is_fixed and not fitting):
            raise UserError(
                f"{self.name} takes images of {shape[1:]}, but the images of the orientation bundle have {channels} "
                "channel(s); use a bundle with the same channels."
            )
        if not layout or not all(isinstance(length, int) for length in size):
            return layout, None
        if options.size and options.size != tuple(size):
            wanted, taken = ("x".join(map(str, each)) for each in (options.size, size))
            raise UserError(f"--size is {wanted}, but {self.name} only takes {taken}.")
        return layout, (size[0], size[1])

    def _find_scores(self, outputs: Outputs, name: str | None) -> str:
        """Return the name of the output with one score per class."""
        candidates = [each for each, rows in outputs.items() if rows.ndim == 2 and rows.dtype.kind == "f"]
        shapes = ", ".join(f"{each} {rows.dtype}{list(rows.shape)}" for each, rows in outputs.items())
        if name is not None and name not in candidates:
            raise UserError(f"--output '{name}' must be a float output (B, classes) of {self.name}; it has {shapes}.")
        if name is None and len(candidates) != 1:
            raise UserError(f"{self.name} has {len(candidates)} float outputs (B, classes): {shapes}. Give --output.")
        return name or candidates[0]

    def _classes(self, options: Attach, records: dict[str, Any], count: int) -> tuple[str, ...]:
        """Return the names of the classes; those of several classes get numbers."""
        names: Sequence[str] = records.get("classes") or tuple(map(str, range(count)))
        origin = "the metadata"
        if options.classes is not None:
            check_exists(path := Path(options.classes), "a text file with one class per line")
            names, origin = path.read_text(encoding="utf-8").splitlines(), f"'{path}'"
        if len(names) != count:
            raise UserError(f"{self.name} has {count} scores, but {origin} lists {len(names)} classes.")
        counts = Counter(names)
        return tuple(f"{name} ({i})" if counts[name] > 1 else name for i, name in enumerate(names))


def read_records(model: Path, *, is_upright: bool) -> dict[str, Any]:
    """Return the parts of the preprocessing that files beside a model record, by the names of the options of `Attach`.

    There may also be ``background``, and ``classes`` are a list. Only the manifest of an Upright model is read. Raise a
    `UserError` if a file cannot be read.
    """
    records: dict[str, Any] = {}
    readers = {"config.json": _read_config, "preprocessor_config.json": _read_processor}
    for name, read in (readers | ({MANIFEST: _read_manifest} if is_upright else {})).items():
        if not (file := model.with_name(name)).is_file():
            continue
        try:
            records |= read(json.loads(file.read_text(encoding="utf-8")))
            if not 0 < (crop := records.get("crop", 1.0)) <= 1:
                raise ValueError(f"the crop is {crop:g} of the resized image, and not between 0 and 1")
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"'{file}' cannot be read: {type(error).__name__}: {error}. Fix or move it.") from None
    return records


def _read_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    if manifest.get("task") == "multilabel":
        raise UserError(
            "attach compares the first class of an image, and this model finds several classes per image: "
            "give a model with one class per image."
        )
    spec = ImageSpec.from_dict(manifest["spec"])
    _note_filter(manifest.get("interpolation", "bilinear") == "bilinear")
    rule = "stretch" if spec.resize == "none" else spec.resize
    return {
        "size": (spec.height, spec.width), "resize": rule, "background": spec.background, "classes": spec.classes,
    }  # fmt: skip


def _read_config(config: dict[str, Any]) -> dict[str, Any]:
    """Read ``config.json`` of timm or of a model of transformers."""
    labels = config.get("id2label") or {}
    classes = config.get("label_names", [labels[str(number)] for number in range(len(labels))])
    records = {"classes": classes} if classes else {}
    if timm := config.get("pretrained_cfg"):
        _note_filter(timm.get("interpolation", "bilinear") == "bilinear")
        records |= {"size": tuple(timm["input_size"][1:]), "resize": TIMM_CROPS[timm.get("crop_mode", "center")]}
        records |= {"mean": timm["mean"], "std": timm["std"], "crop": timm.get("crop_pct", 1.0)}
    return records


def _read_processor(config: dict[str, Any]) -> dict[str, Any]:
    """Read ``preprocessor_config.json`` of transformers."""
    records: dict[str, Any] = {}
    size, crop_size = _sides(config.get("size")), _sides(config.get("crop_size"))
    shortest = isinstance(config.get("size"), dict) and "shortest_edge" in config["size"]
    if config.get("do_resize", True) and size:
        if config.get("do_center_crop") and crop_size:
            records = {"size": crop_size, "resize": "crop", "crop": crop_size[0] / size[0]}
        elif shortest and config.get("crop_pct"):
            records = {"size": size, "resize": "crop", "crop": config["crop_pct"]}
        elif not shortest:
            records = {"size": size, "resize": "stretch"}
    if config.get("do_normalize", True):
        records |= {"mean": config["image_mean"], "std": config["image_std"]}
    factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    offset = -1.0 if config.get("rescale_offset") else 0.0
    matching = [name for name, each in RANGES.items() if np.allclose(each, (255 * factor, offset), rtol=1e-3)]
    if not matching:
        raise ValueError(f"the rescale_factor {factor:g} leads to none of the ranges {', '.join(RANGES)}")
    _note_filter(config.get("resample", BILINEAR) == BILINEAR)
    return records | {"range": matching[0]}


def _note_filter(bilinear: bool) -> None:
    if not bilinear:
        print("Note: the model was trained with another filter; the graph resizes bilinearly, with antialiasing.")


def _sides(size: Any) -> tuple[int, int] | None:
    if isinstance(size, dict):
        size = size.get("shortest_edge") or (size["height"], size["width"])
    return (size, size) if isinstance(size, int) else tuple(size) if size else None


def _per_channel(flag: str, values: Sequence[float], channels: int) -> Sequence[float]:
    if len(values) not in (1, channels):
        raise UserError(f"{flag} needs 1 or {channels} numbers, one per channel, got {len(values)}.")
    return [float(value) for value in values] * (channels // len(values))
