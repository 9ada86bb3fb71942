"""Fine-tuning: weights to start from, possibly of other classes, and a body that is frozen or learns more slowly.

**Finding the head.** `head` builds the network again with one extra class. The parameters whose shape changes are the
*head*; the other parameters are the *body*. Spatial transformers of a `TransformerNetwork` are separate parts: weights
that were trained without a transformer can start a network with one, and the other way round. A new transformer can
have the weights of an orientation in its `NetworkLocaliser`.

**Matching weights.** Tensors are matched by name and shape, whatever wrappers (`PREFIXES`) begin their names. At least
`MIN_FIT` of the body's tensors must fit; the others start from scratch.
"""

import json
import re
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
from upright.architectures.voting import NetworkLocaliser
from upright.checkpoint import (
    KEY,
    check_format,
    find_checkpoint,
    load_file,
    output_count,
    read_checkpoint,
    training_hashes,
)
from upright.data.datamodule import ImageDataModule
from upright.errors import UserError
from upright.files import file_hash
from upright.images import ImageSpec
from upright.recipes import Recipe, load_class, recipe
from upright.training.module import ImageModule
from upright.training.published_weights import (
    MEAN,
    STD,
    VGG_FIRST_LINEAR,
    VGG_POOLED,
    are_imagenet_classes,
    merge_pooling,
    resnet_weights,
    vgg_weights,
)
from upright.training.restoring import check_unseen

MIN_FIT = 0.8
"""Smallest share of the body's tensors for which weights must have a tensor of the same name and shape."""
PREFIXES = ("module", "model", "network", "net", "backbone")
"""Attributes that hold a network in a wrapper: DataParallel's, those of common LightningModules, and our own."""
WRAPPERS = re.compile(rf"^(({'|'.join(PREFIXES)})\.)+")
CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "weights")
"""Keys under which training scripts store a state dict beside other things."""

PUBLISHED_HEADS = {ResNet: "classifier.weight", VGG: "classifier.layers.7.weight"}


class WeightName(NamedTuple):
    """Name of a parameter or buffer that does not depend on which transformers the network has."""

    place: str
    """Place of its transformer, as `TransformerNetwork` names it; empty for the network itself."""
    name: str

    def __str__(self) -> str:
        return f"transformer at {self.place}: {self.name}" if self.place else self.name


class StartWeights(NamedTuple):
    """Weights to start from, and the facts about them that are known."""

    state: dict[str, Tensor]
    origin: str
    """Author of the weights, for messages."""
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """Mean and std of the images that the weights were trained on."""
    same_classes: bool = False
    """True if the classes are the same in the same order, so that the head can be used."""
    network: Recipe | None = None
    run: dict[str, Any] | None = None
    image_hashes: Tensor | None = None
    """Content hashes of the images that the weights were trained on."""
    remarks: tuple[str, ...] = ()


class LocaliserWeights(NamedTuple):
    """Weights of an orientation for a `NetworkLocaliser`."""

    name: str
    """Name of the localiser in the network."""
    path: Path
    source: StartWeights


def head(classifier: ImageModule) -> set[str]:
    """Return the names of the network's parameters and buffers that depend on the number of outputs."""
    network, shape = classifier.arguments["network"], classifier.spec.input_shape
    more = classifier.outputs + 1
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                wider = network(shape, more).state_dict()
        except (RuntimeError, NotImplementedError):  # a network that computes with its weights in __init__
            wider = network(shape, more).state_dict()
    own = classifier.model.network.state_dict()
    return {name for name, value in own.items() if name not in wider or wider[name].shape != value.shape}


def start_from(
    classifier: ImageModule, path: str | Path | None = None, data: ImageDataModule | None = None
) -> list[str]:
    """Load weights into a classifier by name and shape, before training, and record their origin in its ``start``.

    A `NetworkLocaliser` with ``weights`` gets them, unless ``path`` holds the weights of its transformer.

    Args:
        classifier: a new classifier. Only its network's weights, ``start`` and ``start_hashes`` change.
        path: an Upright checkpoint, a run's folder, or a state dict (``.pth``, ``.safetensors``); by default the
            published weights of a network that is ``pretrained``, such as `Timm`.
        data: a datamodule whose validation and test images must not be ones that the weights were trained on.

    Returns:
        Messages for the user, one per line; none if there are no weights to load.

    Raises:
        UserError: for a file that cannot be read, weights of another network, or data whose validation or test
            images the weights were trained on; the classifier is then unchanged.
    """
    network = classifier.model.network
    localisers = [
        _read_localiser(name, module, classifier, data)
        for name, module in network.named_modules()
        if isinstance(module, NetworkLocaliser) and module.weights
    ]
    if path is not None:
        path = find_checkpoint(path)
        source, digest, name = _read(path, classifier, data), file_hash(path), str(path)
    elif published := _published_weights(classifier):
        source, digest, name = published, None, published.origin
    elif localisers:
        classifier.start = {"path": None, "sha256": None, "run": None, "anew": sorted(network.state_dict())}
        return _start_localisers(classifier, localisers)
    else:
        return []
    state, head_names = network.state_dict(), head(classifier)
    names = _weight_names(state, classifier.recipe["init_args"]["network"])
    weights = {key: source.state[own] for key, own in _weight_names(source.state, source.network).items()}
    missing_places, unused_places = _places(names) - _places(weights), _places(weights) - _places(names)
    new = {name for key, name in names.items() if key.place in missing_places}
    new |= set() if source.same_classes else head_names
    wanted = {key: state[name] for key, name in names.items() if name not in new}
    offered = {k: v for k, v in weights.items() if k.place not in unused_places and names.get(k) not in new}
    fitting = {key for key, value in wanted.items() if key in offered and offered[key].shape == value.shape}
    misfits = _check_fit(name, offered, wanted, fitting)
    # torchvision's first files lack the number of batches, which is not used.
    new |= {names[key] for key in wanted.keys() - fitting if not key.name.endswith("num_batches_tracked")}
    network.load_state_dict(state | {names[key]: offered[key] for key in fitting})
    classifier.start = {"path": name, "sha256": digest, "run": source.run, "anew": sorted(new)}
    classifier.start_hashes = source.image_hashes

    origin = name if path is None else f"'{name}' ({source.origin})"
    lines = [f"Start: {origin}, {len(fitting)} of {len(state)} tensors."]
    if not source.same_classes:
        modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name in state if name in head_names))
        heads = [weights[key] for key, name in names.items() if name in head_names and key in weights]
        count, old = classifier.outputs, next((len(value) for value in heads if value.ndim), None)
        kind = "classes" if classifier.spec.classes else "rotations"
        outputs = f"{count} other {kind}" if old in (count, None) else f"{count} {kind} in place of {old}"
        lines.append(f"{' and '.join(modules)} start{'s' if len(modules) == 1 else ''} from scratch: {outputs}.")
    lines += misfits
    localisers = [each for each in localisers if f"{each.name}.scale" in new]
    lines += _start_localisers(classifier, localisers)
    started = {key.place for key, name in names.items() for each in localisers if name.startswith(f"{each.name}.")}
    lines += [f"The transformer at {place} starts from scratch." for place in sorted(missing_places - started)]
    lines += [f"The transformer at {place} is ignored: the network has none there." for place in sorted(unused_places)]
    lines += source.remarks
    theirs, ours = source.normalisation, (classifier.spec.mean, classifier.spec.std)
    if theirs is not None and theirs != ours:
        lines.append(
            f"The weights were trained on images of mean {list(theirs[0])} and std {list(theirs[1])}; "
            f"these data have mean {list(ours[0])} and std {list(ours[1])}."
        )
    return lines


def _read_localiser(
    name: str, localiser: NetworkLocaliser, classifier: ImageModule, data: ImageDataModule | None
) -> LocaliserWeights:
    """Read the weights of a localiser. Raise a `UserError` if they were not trained in the form that it has."""
    assert localiser.weights is not None
    path = find_checkpoint(localiser.weights)
    checkpoint = read_checkpoint(path)
    ours, spec = checkpoint[KEY], classifier.spec
    theirs = ImageSpec.from_dict(ours["spec"])
    if theirs.classes:
        raise UserError(f"'{path}' is a classifier; weights of NetworkLocaliser must be a run of OrientationEstimator.")
    if data is not None:
        check_unseen(ours, data, path)
    wanted = {
        "network": _complete(ours["model"]["init_args"]["network"]),
        "turns": output_count(ours),
        "size": theirs.height,
        "mask": theirs.mask,
    }
    actual = {each: getattr(localiser, each) for each in wanted} | {"network": _complete(recipe(localiser.factory))}
    if others := {each: value for each, value in wanted.items() if value != actual[each]}:
        raise UserError(
            f"'{path}' was trained in another form than the NetworkLocaliser has. Give it these init_args: "
            f"{json.dumps(others)}."
        )
    if theirs.channels != spec.channels:
        raise UserError(f"'{path}' was trained on {theirs.summary}; the data have {spec.summary}.")
    source = _upright_weights(checkpoint, spec)
    state = {f"network.{key}": value for key, value in source.state.items()}
    # The network of the transformer gets images with the normalisation of the data.
    means, stds = (
        torch.tensor([getattr(each, part) for each in (spec, theirs)])[:, :, None, None] for part in ("mean", "std")
    )
    state |= {"scale": stds[0] / stds[1], "shift": (means[0] - means[1]) / stds[1]}
    if {key: v.shape for key, v in state.items()} != {key: v.shape for key, v in localiser.state_dict().items()}:
        raise UserError(f"'{path}' holds the weights of another network than its config names: train it again.")
    remarks = () if spec.mask == "none" else source.remarks  # the localiser has its own mask
    return LocaliserWeights(name, path, source._replace(state=state, remarks=remarks))


def _complete(network: Recipe) -> Recipe:
    """Return the recipe of a network with all its defaults, as JSON has it."""
    parameters = signature(load_class(network["class_path"])).parameters.values()
    defaults = {each.name: recipe(each.default) for each in parameters if each.default is not each.empty}
    complete: Recipe = json.loads(json.dumps(network | {"init_args": defaults | network.get("init_args", {})}))
    return complete


def _start_localisers(classifier: ImageModule, localisers: Sequence[LocaliserWeights]) -> list[str]:
    """Load the weights of localisers, record their origin in ``start``, and return messages for the user."""
    assert classifier.start is not None
    lines = []
    for name, path, source in localisers:
        classifier.model.network.get_submodule(name).load_state_dict(source.state)
        origin = {"path": str(path), "sha256": file_hash(path), "run": source.run}
        classifier.start.setdefault("localisers", []).append(origin)
        both = [each for each in (classifier.start_hashes, source.image_hashes) if each is not None]
        classifier.start_hashes = torch.unique(torch.cat(both)) if both else None
        lines += [f"Start of {name}: '{path}' ({source.origin}), {len(source.state)} tensors.", *source.remarks]
    return lines


def _published_weights(classifier: ImageModule) -> StartWeights | None:
    """Return the published weights of a pretrained network; None if no part of the network is pretrained."""
    if (part := _pretrained(classifier.model.network)) is None:
        return None
    place, module = part
    try:
        published = module.published()
    except ValueError as error:
        raise UserError(str(error)) from None
    state = {f"{place}{name}": value for name, value in published.weights.items()}
    same_classes = are_imagenet_classes(classifier.spec.classes)
    return StartWeights(state, published.origin, (published.mean, published.std), same_classes)


def _pretrained(network: nn.Module) -> tuple[str, Any] | None:
    """Return the first module that is ``pretrained``, after the prefix of its names in the innermost network."""
    for place, module in _innermost(network).named_modules():
        if getattr(module, "pretrained", False) is True and hasattr(module, "published"):
            return f"{place}." if place else "", module
    return None


def _innermost(network: nn.Module) -> nn.Module:
    """Return the network inside all `TransformerNetwork`."""
    return _innermost(network.network) if isinstance(network, TransformerNetwork) else network


def _read(path: Path, classifier: ImageModule, data: ImageDataModule | None) -> StartWeights:
    content = load_file(path, "an Upright checkpoint or a state dict")
    if isinstance(content, dict) and KEY in content:
        check_format(content, path)
        if data is not None:
            check_unseen(content[KEY], data, path)
        return _upright_weights(content, classifier.spec)
    state = _state_dict(content)
    if state is None:
        raise UserError(f"'{path}' holds neither an Upright checkpoint nor a state dict (names and their tensors).")
    network = _innermost(classifier.model.network)
    state = {WRAPPERS.sub("", name.replace("_orig_mod.", "")): value for name, value in state.items()}
    if isinstance(network, ResNet | VGG):
        return _torchvision_weights(state, network, classifier.spec.classes)
    return StartWeights(state, "a state dict")


def _state_dict(content: Any) -> dict[str, Tensor] | None:
    """Return the state dict in the content of a file; None if there is none."""
    if not isinstance(content, dict) or not content:
        return None
    if all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        return dict(content)
    return next((state for key in CONTAINERS if (state := _state_dict(content.get(key))) is not None), None)


def _upright_weights(checkpoint: dict[str, Any], spec: ImageSpec) -> StartWeights:
    ours, prefix = checkpoint[KEY], "model.network."
    theirs = ImageSpec.from_dict(ours["spec"])
    state = {name.removeprefix(prefix): v for name, v in checkpoint["state_dict"].items() if name.startswith(prefix)}
    run = {name: ours["run"][name] for name in ("name", "id")}
    remark = f"The weights were trained on images with mask {theirs.mask}; these data have mask {spec.mask}."
    return StartWeights(
        state,
        f"run {run['name']}, {run['id']}",
        (theirs.mean, theirs.std),
        theirs.classes == spec.classes,
        ours["model"]["init_args"]["network"],
        run,
        training_hashes(ours),
        () if theirs.mask == spec.mask else (remark,),
    )


def _weight_names(state: Mapping[str, Tensor], network: Recipe | None) -> dict[WeightName, str]:
    """Return the names in a state dict by `WeightName`, with the places from the network's config.

    Wrappers are removed from the beginning of all names, unless two names would then be equal.
    """
    names = {_weight_name(name, network): name for name in state}
    short = {key._replace(name=WRAPPERS.sub("", key.name)): name for key, name in names.items()}
    return short if len(short) == len(names) else names


def _weight_name(name: str, network: Recipe | None) -> WeightName:
    if network is None or network["class_path"] != recipe(TransformerNetwork)["class_path"]:
        return WeightName("", name)
    arguments = network.get("init_args", {})
    part, _, rest = name.partition(".")
    if part == "transformer":
        return WeightName("input", rest)
    # A place holds Sequential(transformer, original module), see transformer_network._insert.
    places = arguments.get("places", signature(TransformerNetwork).parameters["places"].default)
    plain: list[str] = []
    steps = iter(rest.split("."))
    for step in steps:
        plain.append(step)
        if (place := ".".join(plain)) in places and next(steps) == "0":
            return WeightName(place, ".".join(steps))
    inner = _weight_name(".".join(plain), arguments["network"])
    return WeightName(f"network.{inner.place}", inner.name) if inner.place else inner


def _places(keys: Iterable[WeightName]) -> set[str]:
    return {key.place for key in keys} - {""}


def _check_fit(
    name: str, weights: Mapping[WeightName, Tensor], wanted: Mapping[WeightName, Tensor], fitting: set[WeightName]
) -> list[str]:
    """Return sentences about tensors that do not fit; refuse the weights if too few fit."""
    counted = [key for key in wanted if not key.name.endswith("num_batches_tracked")]
    missing = [key for key in counted if key not in weights]
    unexpected = [key for key in weights if key not in wanted]
    others = [
        f"{key} is {_shape(weights[key])} in place of {_shape(wanted[key])}"
        for key in counted
        if key in weights and key not in fitting
    ]
    reasons = (
        (missing, "it lacks ", "From scratch, because the weights have none of this name: "),
        (unexpected, "the network has no ", "Not used, because the network has none of this name: "),
        (others, "", "From scratch, because of another shape: "),
    )
    share = len(fitting.intersection(counted)) / max(1, len(counted))
    if share < MIN_FIT:
        problems = "; ".join(problem + _list_some(items) for items, problem, _ in reasons if items)
        raise UserError(
            f"'{name}' holds the weights of another network: {problems}. {share:.0%} of the tensors before "
            f"the head fit, and at least {MIN_FIT:.0%} must."
        )
    return [f"{remark}{_list_some(items)}." for items, _, remark in reasons if items]


def _list_some(items: Sequence[object], limit: int = 3) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(map(str, items[:limit])) + more


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "one number"


def _torchvision_weights(state: dict[str, Tensor], network: ResNet | VGG, classes: tuple[str, ...]) -> StartWeights:
    weights = resnet_weights(state) if isinstance(network, ResNet) else vgg_weights(state)
    if weights.keys() == state.keys():  # they already have our names
        return StartWeights(state, "a state dict")
    remarks: tuple[str, ...] = ()
    linear = weights.get(VGG_FIRST_LINEAR)
    if isinstance(network, VGG) and linear is not None:
        maps, rows, columns = network.maps
        if linear.shape[1:] == (maps * VGG_POOLED**2,) and (rows, columns) != (VGG_POOLED, VGG_POOLED):
            weights[VGG_FIRST_LINEAR] = merge_pooling(linear, rows, columns)
            remarks = (
                f"{VGG_FIRST_LINEAR.removesuffix('.weight')} was trained on {VGG_POOLED}x{VGG_POOLED} maps, but "
                f"these images give {rows}x{columns}: its weights now include torchvision's pooling.",
            )
    last = weights.get(PUBLISHED_HEADS[type(network)])
    same_classes = are_imagenet_classes(classes) and last is not None and last.shape[:1] == (len(classes),)
    return StartWeights(weights, "torchvision's", (MEAN, STD), same_classes, remarks=remarks)


class Freeze(Callback):
    """Freeze the body in the first epochs, and then train it at a smaller rate if asked.

    All that the file of `start_from` lacks is always trained: a new head, and new transformers, also with a
    `NetworkLocaliser` that has its own weights. A frozen body has no gradients, and its batch normalisation uses its
    stored statistics and does not update them.

    Args:
        until_epoch: the first epoch that trains the body, counted from 0; None if no epoch does.
        lr_factor: factor on the body's learning rate, in addition to the ``lr_factor`` of its modules.
        head: whether a head that has its weights belongs to the body, too.
    """

    def __init__(self, until_epoch: int | None = 0, lr_factor: float = 1.0, head: bool = False) -> None:
        if (until_epoch is not None and until_epoch < 0) or lr_factor <= 0:
            raise UserError(
                f"Freeze needs until_epoch of at least 0 and lr_factor above 0, got {until_epoch} and {lr_factor}."
            )
        self.until_epoch, self.lr_factor, self.head = until_epoch, lr_factor, head
        self._body: set[str] = set()
        self._network = nn.Module()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the body and set its ``lr_factor``, before the optimiser makes its groups."""
        if stage != "fit":
            return
        assert isinstance(pl_module, ImageModule)
        self._network = network = pl_module.model.network
        new = set((pl_module.start or {}).get("anew", ()))
        new |= set() if self.head else head(pl_module)
        own = any(isinstance(module, NetworkLocaliser) and module.weights for module in network.modules())
        if not pl_module.start and (own or _pretrained(network)):  # with a stock Trainer, these weights load later
            names = _weight_names(network.state_dict(), pl_module.recipe["init_args"]["network"])
            new |= {name for key, name in names.items() if key.place}
        self._body = {name for name, _ in network.named_parameters() if name not in new}
        if not self._body:
            raise UserError(
                f"Freeze has nothing to freeze: all parameters of {type(network).__name__} start from scratch, or "
                "depend on the number of classes."
            )
        for name in self._body:
            parameter = network.get_parameter(name)
            parameter.lr_factor = self.lr_factor
            parameter.requires_grad_(self.until_epoch is not None)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Freeze again in a run that resumes within an epoch, because that epoch does not start again."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.until_epoch == 0:
            return
        frozen = self._freezes(trainer.current_epoch)
        if trainer.world_size == 1:
            for parameter in self._parameters():
                parameter.requires_grad_(not frozen)
        for name, module in self._network.named_modules():
            own = {f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)}
            if hasattr(module, "running_mean") and own <= self._body:
                module.train(not frozen)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Discard the body's gradients. Several processes fix at the start which parameters have gradients."""
        if trainer.world_size > 1 and self._freezes(trainer.current_epoch):
            for parameter in self._parameters():
                parameter.grad = None

    def _freezes(self, epoch: int) -> bool:
        return self.until_epoch is None or epoch < self.until_epoch

    def _parameters(self) -> list[nn.Parameter]:
        return [value for name, value in self._network.named_parameters() if name in self._body]

    def state_dict(self) -> dict[str, Any]:
        """Return ``lr_factor``. A resumed run must not change it, because the optimiser's rates are restored."""
        return {"lr_factor": self.lr_factor}
