"""Fine-tuning: weights to start from, whose head may know other classes, and a body that waits or learns more slowly.

The *head* is what depends on the number of classes, in any network: one is built for a class more, and what then has
another shape is the head; the rest is the *body*. Spatial transformers of a `TransformerNetwork` are parts of their
own: a network that learnt without one may be given one, and the other way round.
"""

from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from upright.architectures.resnet import ResNet
from upright.architectures.transformer_network import TransformerNetwork
from upright.architectures.vgg import VGG
from upright.checkpoint import KEY, check_format, find_checkpoint, learnt_from, load_file
from upright.data.datamodule import ImageDataModule
from upright.errors import UserError
from upright.files import file_hash
from upright.images import ImageSpec
from upright.recipes import Recipe, recipe
from upright.training.classifier import ImageClassifier
from upright.training.published_weights import (
    MEAN,
    STD,
    VGG_FIRST_LINEAR,
    VGG_POOLED,
    are_imagenets,
    resnet_weights,
    unpooled,
    vgg_weights,
)
from upright.training.restoring import check_unseen

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]

PUBLISHED_HEADS = {ResNet: "classifier.weight", VGG: "classifier.layers.7.weight"}


class Key(NamedTuple):
    """A parameter or buffer, whatever transformers were put around and into the network."""

    place: str
    """Of the transformer that it is of, as `TransformerNetwork` names them; empty for the network itself."""
    name: str

    def __str__(self) -> str:
        return f"transformer at {self.place}: {self.name}" if self.place else self.name


class Source(NamedTuple):
    """Weights to start from."""

    weights: dict[Key, Tensor]
    whose: str
    normalisation: Normalisation
    same_classes: bool
    """In the same order, so that the head can be used."""
    run: dict[str, Any] | None = None
    seen: Tensor | None = None
    """Content hashes of the images that they were learnt from, where known."""
    remarks: tuple[str, ...] = ()


def head(classifier: ImageClassifier) -> set[str]:
    """Names of the network's parameters and buffers that depend on the number of classes."""
    network, shape = classifier.arguments["network"], classifier.spec.input_shape
    more = len(classifier.spec.classes) + 1
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                wider = network(shape, more).state_dict()
        except (RuntimeError, NotImplementedError):  # it computes with its weights while it is built
            wider = network(shape, more).state_dict()
    own = classifier.model.network.state_dict()
    return {name for name, value in own.items() if name not in wider or wider[name].shape != value.shape}


def start_from(
    classifier: ImageClassifier, path: str | Path, data: ImageDataModule | None = None, *, allow_seen: bool = False
) -> list[str]:
    """Take weights over, by name and shape, before training; ``classifier.start`` then says from where.

    Args:
        classifier: as it was built; nothing but its network's weights changes.
        path: an Upright checkpoint, a run's folder, or a state dict of torchvision's ResNet or VGG.
        data: what it will be trained with and judged by.
        allow_seen: whether it may be judged by images that the weights were learnt from.

    Returns:
        What to tell the user, line by line.

    Raises:
        UserError: for a file that cannot be read, weights of another network, or data whose validation or test
            images the weights were learnt from; the classifier is then as it was.
    """
    path = find_checkpoint(path)
    source = _read(path, classifier, data, allow_seen)
    network, found = classifier.model.network, source.weights
    state, its_head = network.state_dict(), head(classifier)
    names = _keys(state, classifier.recipe["init_args"]["network"])
    without, left_out = _places(names) - _places(found), _places(found) - _places(names)
    anew = {name for key, name in names.items() if key.place in without}
    anew |= set() if source.same_classes else its_head
    taken = {key: value for key, value in found.items() if key.place not in left_out and names.get(key) not in anew}
    _check_fit(path, taken, {key: state[name] for key, name in names.items() if name not in anew})
    network.load_state_dict(state | {names[key]: value for key, value in taken.items()})
    classifier.start = {"path": str(path), "sha256": file_hash(path), "run": source.run, "anew": sorted(anew)}
    classifier.seen = source.seen

    lines = [f"Start: '{path}' ({source.whose}), {len(taken)} of {len(state)} tensors."]
    if not source.same_classes:
        modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name in state if name in its_head))
        rows = next((found[key].shape[:1] for key, name in names.items() if name in its_head and key in found), ())
        count = len(classifier.spec.classes)
        what = f"{count} classes in place of {rows[0]}" if rows and rows[0] != count else f"{count} other classes"
        lines.append(f"{' and '.join(modules)} start{'s' if len(modules) == 1 else ''} anew: {what}.")
    lines += [f"The transformer at {place} starts anew." for place in sorted(without)]
    lines += [f"The transformer at {place} is left out: the network has none there." for place in sorted(left_out)]
    lines += source.remarks
    theirs, ours = source.normalisation, (classifier.spec.mean, classifier.spec.std)
    if theirs != ours:
        lines.append(
            f"They learnt from images of mean {list(theirs[0])} and std {list(theirs[1])}; "
            f"these data say mean {list(ours[0])} and std {list(ours[1])}."
        )
    return lines


def _read(path: Path, classifier: ImageClassifier, data: ImageDataModule | None, allow_seen: bool) -> Source:
    loaded = load_file(path, "an Upright checkpoint or a state dict")
    if isinstance(loaded, dict) and KEY in loaded:
        check_format(loaded, path)
        if data is not None and not allow_seen:
            check_unseen(loaded[KEY], data, path)
        return _of_upright(loaded, classifier.spec)
    weights = loaded.items() if isinstance(loaded, dict) else ()
    if not weights or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in weights):
        raise UserError(f"'{path}' holds neither an Upright checkpoint nor a state dict (names and their tensors).")
    network: Any = classifier.model.network
    while isinstance(network, TransformerNetwork):
        network = network.network
    if not isinstance(network, ResNet | VGG):
        raise UserError(
            f"'{path}' is no Upright checkpoint, and torchvision's weights fit a ResNet or a VGG only; "
            f"the network is a {type(network).__name__}."
        )
    return _of_torchvision(loaded, network, classifier)


def _of_upright(checkpoint: dict[str, Any], spec: ImageSpec) -> Source:
    ours, prefix = checkpoint[KEY], "model.network."
    theirs = ImageSpec.from_dict(ours["spec"])
    state = {name.removeprefix(prefix): v for name, v in checkpoint["state_dict"].items() if name.startswith(prefix)}
    keys = _keys(state, ours["model"]["init_args"]["network"])
    run = {name: ours["run"][name] for name in ("name", "id")}
    return Source(
        {key: state[name] for key, name in keys.items()},
        f"run {run['name']}, {run['id']}",
        (theirs.mean, theirs.std),
        theirs.classes == spec.classes,
        run,
        learnt_from(ours),
    )


def _keys(names: Iterable[str], network: Recipe) -> dict[Key, str]:
    """Every name of a network's state dict by what it is of, told by the network's recipe."""
    return {_key(name, network): name for name in names}


def _key(name: str, network: Recipe) -> Key:
    if network["class_path"] != recipe(TransformerNetwork)["class_path"]:
        return Key("", name)
    arguments = network.get("init_args", {})
    part, _, rest = name.partition(".")
    if part == "transformer":
        return Key("input", rest)
    # A place holds Sequential(transformer, what stood there), see transformer_network._insert.
    places = arguments.get("places", signature(TransformerNetwork).parameters["places"].default)
    plain: list[str] = []
    steps = iter(rest.split("."))
    for step in steps:
        plain.append(step)
        if (place := ".".join(plain)) in places and next(steps) == "0":
            return Key(place, ".".join(steps))
    inner = _key(".".join(plain), arguments["network"])
    return Key(f"network.{inner.place}", inner.name) if inner.place else inner


def _places(keys: Iterable[Key]) -> set[str]:
    return {key.place for key in keys} - {""}


def _check_fit(path: Path, taken: Mapping[Key, Tensor], wanted: Mapping[Key, Tensor]) -> None:
    # torchvision's first files do not count batches, and nothing is made of the count.
    missing = [key for key in wanted if key not in taken and not key.name.endswith("num_batches_tracked")]
    unexpected = [key for key in taken if key not in wanted]
    others = [
        f"{key} is {_shape(taken[key])} in place of {_shape(value)}"
        for key, value in wanted.items()
        if key in taken and taken[key].shape != value.shape
    ]
    told = [f"it lacks {_some(missing)}"] if missing else []
    told += [f"the network has no {_some(unexpected)}"] if unexpected else []
    told += [_some(others)] if others else []
    if told:
        raise UserError(f"'{path}' holds the weights of another network: {'; '.join(told)}.")


def _some(of: Sequence[object], shown: int = 3) -> str:
    more = f" and {len(of) - shown} more" if len(of) > shown else ""
    return ", ".join(map(str, of[:shown])) + more


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "one number"


def _of_torchvision(state: dict[str, Tensor], network: ResNet | VGG, classifier: ImageClassifier) -> Source:
    weights = resnet_weights(state) if isinstance(network, ResNet) else vgg_weights(state)
    remarks: list[str] = []
    linear = weights.get(VGG_FIRST_LINEAR)
    if isinstance(network, VGG) and linear is not None:
        maps, rows, columns = _maps(network, classifier)
        if linear.shape[1:] == (maps * VGG_POOLED**2,) and (rows, columns) != (VGG_POOLED, VGG_POOLED):
            weights[VGG_FIRST_LINEAR] = unpooled(linear, rows, columns)
            remarks.append(
                f"{VGG_FIRST_LINEAR.removesuffix('.weight')} learnt from {VGG_POOLED}x{VGG_POOLED} maps, and these "
                f"images make {rows}x{columns}: it now takes them as torchvision's pooling does."
            )
    classes, last = classifier.spec.classes, weights.get(PUBLISHED_HEADS[type(network)])
    return Source(
        {Key("", name): value for name, value in weights.items()},
        "torchvision's",
        (MEAN, STD),
        are_imagenets(classes) and last is not None and last.shape[:1] == (len(classes),),
        remarks=tuple(remarks),
    )


@torch.no_grad()
def _maps(network: VGG, classifier: ImageClassifier) -> tuple[int, ...]:
    """Shape of what the convolutions give, ``(C, H, W)``, in the network as it stands behind its transformer."""
    found: list[tuple[int, ...]] = []
    handle = network.features.register_forward_hook(lambda _module, _inputs, maps: found.append(tuple(maps.shape[1:])))
    model, training = classifier.model, classifier.training
    model.eval()(torch.zeros(1, *classifier.spec.input_shape))
    model.train(training)
    handle.remove()
    return found[0]


class Freeze(Callback):
    """Only what starts anew is trained at first; the body waits, and then may learn at a smaller rate.

    What starts anew is the head, with whatever transformers `start_from` found no weights for. While the body waits it
    has no gradients, and its batch normalisation goes by what it knows and does not learn.

    Args:
        until_epoch: the first epoch that trains the body, counted from 0.
        lr_factor: of the body's learning rate, multiplied with those that its modules ask for.
    """

    def __init__(self, until_epoch: int = 0, lr_factor: float = 1.0) -> None:
        if until_epoch < 0 or lr_factor <= 0:
            raise UserError(
                f"Freeze needs until_epoch of at least 0 and lr_factor above 0, got {until_epoch} and {lr_factor}."
            )
        self.until_epoch, self.lr_factor = until_epoch, lr_factor
        self._body: set[str] = set()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Tell the body from the rest, before the optimiser makes its groups."""
        if stage != "fit":
            return
        assert isinstance(pl_module, ImageClassifier)
        network, anew = pl_module.model.network, head(pl_module) | set((pl_module.start or {}).get("anew", ()))
        self._body = {name for name, _ in network.named_parameters() if name not in anew}
        if not self._body:
            raise UserError(
                f"Freeze has nothing to freeze: all of {type(network).__name__} depends on the number of classes."
            )
        for name in self._body:
            network.get_parameter(name).lr_factor = self.lr_factor

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that is resumed within an epoch does not start that epoch."""
        self._freeze(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Freeze, or unfreeze."""
        self._freeze(trainer, pl_module)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Several processes agree at the start on who has gradients: there the body's are thrown away."""
        if trainer.world_size > 1 and trainer.current_epoch < self.until_epoch:
            for parameter in self._parameters(pl_module):
                parameter.grad = None

    def _parameters(self, classifier: L.LightningModule) -> list[nn.Parameter]:
        assert isinstance(classifier, ImageClassifier)
        return [value for name, value in classifier.model.network.named_parameters() if name in self._body]

    def _freeze(self, trainer: L.Trainer, classifier: L.LightningModule) -> None:
        if not self.until_epoch:
            return
        frozen = trainer.current_epoch < self.until_epoch
        if trainer.world_size == 1:
            for parameter in self._parameters(classifier):
                parameter.requires_grad_(not frozen)
        assert isinstance(classifier, ImageClassifier)
        for name, module in classifier.model.network.named_modules():
            own = {f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)}
            if hasattr(module, "running_mean") and own <= self._body:
                module.train(not frozen)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must not change: the optimiser's groups are restored with their rates."""
        return {"lr_factor": self.lr_factor}
