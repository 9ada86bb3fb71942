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
from upright.exporting.graph import MAX_BYTES
from upright.exporting.precision import TOLERANCES
from upright.files import check_exists
from upright.images import ImageSpec
from upright.options import Attach
from upright.runtime.bundle import MANIFEST
from upright.runtime.predictor import open_session
from upright.warp import resize

Layout = Literal["nchw", "nhwc"]
Rule = Literal["stretch", "crop", "pad"]
Outputs = dict[str, npt.NDArray[Any]]

DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}
"""Type of the input by onnxruntime's name."""
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

    def to_dict(self) -> dict[str, Any]:
        """Return what the spec of a manifest does not have."""
        return {name: getattr(self, name) for name in ("crop", "channels", "layout", "dtype")}


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
        self.proto = self._load()
        self.session = open_session(path)
        inputs = self.session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in DTYPES:
            ends = ", ".join(f"{each.name} {each.type} {each.shape}" for each in inputs)
            raise UserError(f"{self.name} must have one input of four axes, of {', '.join(DTYPES)}; it has {ends}.")
        self.input = inputs[0]
        self.output_names = [output.name for output in self.session.get_outputs()]
        self.batch = shape[0] if isinstance((shape := self.input.shape)[0], int) else None
        hints = Hints(path, {entry.key: entry.value for entry in self.proto.metadata_props})
        self.preprocessing = self._preprocessing(options, hints, channels)
        outputs = self(torch.zeros(1, *self.preprocessing.spec.input_shape))
        self.scores = self._find_scores(outputs, options.output)
        self._add_classes(options, hints, outputs[self.scores].shape[1])

    def __call__(self, fitted: Tensor) -> Outputs:
        """Return all outputs for images of the input's size ``(B, C, H, W)``, values 0 to 255.

        Raises:
            EngineError: if onnxruntime fails.
        """
        values = self.preprocessing.convert(fitted)
        step = self.batch or len(values)
        names = self.output_names
        parts = []
        for start in range(0, len(values), step):
            part = values[start : start + step]
            filled = part[np.arange(step) % len(part)]
            try:
                results = self.session.run(names, {self.input.name: filled})
            except Exception as error:  # onnxruntime's exceptions have no other common base
                reason = one_line(error)
                raise EngineError(f"onnxruntime failed on {self.name} with {filled.shape}: {reason}") from error
            for name, result in zip(names, results, strict=True):
                if not isinstance(result, np.ndarray) or result.shape[:1] != (step,):
                    raise UserError(f"Output '{name}' of {self.name} must be a tensor with one row per image.")
            parts.append([result[: len(part)] for result in results])
        return {name: np.concatenate(rows) for name, rows in zip(names, zip(*parts, strict=True), strict=True)}

    @cached_property
    def tolerance(self) -> float:
        """Largest difference of a probability between two machines, see `TOLERANCES`."""
        quantized = any("Quantize" in node.op_type or "Integer" in node.op_type for node in self.proto.graph.node)
        half = any(each.data_type == onnx.TensorProto.FLOAT16 for each in self.proto.graph.initializer)
        dtype = self.preprocessing.dtype
        return TOLERANCES["int8" if quantized or dtype == "uint8" else "fp16" if half or dtype == "float16" else "fp32"]

    def _load(self) -> onnx.ModelProto:
        try:
            proto = onnx.load(self.path)
        except Exception as error:  # a damaged file can lead protobuf to any exception; external data may be missing
            raise UserError(f"{self.name} cannot be read as ONNX: {one_line(error)}.") from None
        size = sum(len(each.raw_data) for each in proto.graph.initializer)
        if size > MAX_BYTES:
            raise UserError(
                f"The weights of {self.name} have {size / 1e9:.2f} GB, but one ONNX file holds at most "
                f"{MAX_BYTES / 1e9:.2f} GB; attach a smaller model."
            )
        return proto

    def _preprocessing(self, options: Attach, hints: "Hints", channels: int) -> Preprocessing:
        shape, dtype = self.input.shape, DTYPES[self.input.type]
        layouts: dict[int, Layout] = {1: "nchw", 3: "nhwc"}
        fitting = [layout for axis, layout in layouts.items() if shape[axis] == channels]
        layout = options.layout or (fitting[0] if len(fitting) == 1 else None)
        missing = [] if layout else ["--layout nchw or nhwc"]
        axes = (2, 3) if layout != "nhwc" else (1, 2)
        count = shape[6 - sum(axes)]
        if (layout and isinstance(count, int) and count != channels) or (not fitting and all(map(_is_int, shape[1:]))):
            raise UserError(
                f"{self.name} takes images of {shape[1:]}, but the images of the orientation bundle have {channels} "
                "channel(s); use a bundle with the same channels."
            )
        height, width = (shape[axis] for axis in axes)
        fixed = (height, width) if layout and _is_int(height) and _is_int(width) else None
        if options.size and fixed and options.size != fixed:
            raise UserError(f"--size is {_times(options.size)}, but {self.name} only takes {_times(fixed)}.")
        size = options.size or fixed or hints.size
        rule = options.resize or hints.resize
        missing += [] if size else ["--size HxW"]
        missing += [] if rule else ["--resize stretch, crop or pad"]
        source = options if options.mean or options.std or options.range else hints
        mean, std, unit = source.mean, source.std, source.range
        if dtype == "uint8":
            if source is options:
                raise UserError(f"{self.name} takes uint8, so --mean, --std and --range have no effect; omit them.")
            mean, std, unit = None, None, "byte"
        elif not (mean or std or unit):
            missing.append("--mean and --std, or --range unit, byte or signed")
        if missing:
            raise UserError(f"{self.name} does not record its preprocessing. Give {'; '.join(missing)}.")
        assert size and rule and layout
        factor, offset = RANGES[unit or "unit"]
        means, stds = _per_channel("--mean", mean or (0.0,), channels), _per_channel("--std", std or (1.0,), channels)
        spec = ImageSpec(
            channels,
            size[0],
            size[1],
            (),
            tuple((value - offset) / factor for value in means),
            tuple(value / factor for value in stds),
            rule,
            hints.background,
        )
        crop = options.crop or (1.0 if options.resize else hints.crop)
        return Preprocessing(spec, crop, options.channels or "rgb", layout, dtype)

    def _find_scores(self, outputs: Outputs, name: str | None) -> str:
        """Return the name of the output with one score per class."""
        candidates = [each for each, rows in outputs.items() if rows.ndim == 2 and rows.dtype.kind == "f"]
        shapes = ", ".join(f"{each} {rows.dtype}{list(rows.shape)}" for each, rows in outputs.items())
        if name is not None and name not in candidates:
            raise UserError(f"--output '{name}' must be a float output (B, classes) of {self.name}; it has {shapes}.")
        if name is None and len(candidates) != 1:
            raise UserError(f"{self.name} has {len(candidates)} float outputs (B, classes): {shapes}. Give --output.")
        return name or candidates[0]

    def _add_classes(self, options: Attach, hints: "Hints", count: int) -> None:
        names: Sequence[str] = hints.classes or tuple(map(str, range(count)))
        origin = "the metadata"
        if options.classes is not None:
            check_exists(path := Path(options.classes), "a text file with one class per line")
            names, origin = path.read_text(encoding="utf-8").splitlines(), f"'{path}'"
        if len(names) != count:
            raise UserError(f"{self.name} has {count} scores, but {origin} lists {len(names)} classes.")
        counts = Counter(names)
        unique = tuple(f"{name} ({i})" if counts[name] > 1 else name for i, name in enumerate(names))
        spec = replace(self.preprocessing.spec, classes=unique)
        self.preprocessing = replace(self.preprocessing, spec=spec)


class Hints:
    """The parts of the preprocessing that are recorded in the model or in a file beside it.

    Args:
        path: the model.
        metadata: metadata of the model. With the key ``upright``, its bundle's manifest lies beside it.
    """

    def __init__(self, path: Path, metadata: dict[str, str]) -> None:
        self.size: tuple[int, int] | None = None
        self.resize: Rule | None = None
        self.mean: Sequence[float] | None = None
        self.std: Sequence[float] | None = None
        self.range: str | None = None
        self.crop, self.background = 1.0, 0
        self.classes: Sequence[str] | None = None
        for name, read in {
            "config.json": self._read_config,
            "preprocessor_config.json": self._read_processor,
            MANIFEST: self._read_manifest,
        }.items():
            file = path.with_name(name)
            if not file.is_file() or (name == MANIFEST and "upright" not in metadata):
                continue
            try:
                read(json.loads(file.read_text(encoding="utf-8")))
                if not 0 < self.crop <= 1:
                    raise ValueError(f"the crop is {self.crop:g} of the resized image, and not between 0 and 1")
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise UserError(f"'{file}' cannot be read: {type(error).__name__}: {error}. Fix or move it.") from None

    def _read_manifest(self, manifest: dict[str, Any]) -> None:
        spec = ImageSpec.from_dict(manifest["spec"])
        self.size, self.background, self.classes = (spec.height, spec.width), spec.background, spec.classes
        self.resize = "stretch" if spec.resize == "none" else spec.resize
        _note_filter(manifest.get("interpolation", "bilinear") == "bilinear")

    def _read_config(self, config: dict[str, Any]) -> None:
        """Read ``config.json`` of timm or of a model of transformers."""
        if labels := config.get("id2label"):
            self.classes = [labels[str(number)] for number in range(len(labels))]
        self.classes = config.get("label_names", self.classes)
        if timm := config.get("pretrained_cfg"):
            self.size = tuple(timm["input_size"][1:])
            self.mean, self.std, self.crop = timm["mean"], timm["std"], timm.get("crop_pct", 1.0)
            self.resize = TIMM_CROPS[timm.get("crop_mode", "center")]
            _note_filter(timm.get("interpolation", "bilinear") == "bilinear")

    def _read_processor(self, config: dict[str, Any]) -> None:
        """Read ``preprocessor_config.json`` of transformers."""
        size, crop_size = _sides(config.get("size")), _sides(config.get("crop_size"))
        shortest = isinstance(config.get("size"), dict) and "shortest_edge" in config["size"]
        if config.get("do_resize", True) and size:
            if config.get("do_center_crop") and crop_size:
                self.size, self.resize, self.crop = crop_size, "crop", crop_size[0] / size[0]
            elif shortest and config.get("crop_pct"):
                self.size, self.resize, self.crop = size, "crop", config["crop_pct"]
            elif not shortest:
                self.size, self.resize = size, "stretch"
        if config.get("do_normalize", True):
            self.mean, self.std = config["image_mean"], config["image_std"]
        factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
        offset = -1.0 if config.get("rescale_offset") else 0.0
        matching = [name for name, each in RANGES.items() if np.allclose(each, (255 * factor, offset), rtol=1e-3)]
        if not matching:
            raise ValueError(f"the rescale_factor {factor:g} leads to none of the ranges {', '.join(RANGES)}")
        self.range = matching[0]
        _note_filter(config.get("resample", BILINEAR) == BILINEAR)


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


def _is_int(length: Any) -> bool:
    return isinstance(length, int)


def _times(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
