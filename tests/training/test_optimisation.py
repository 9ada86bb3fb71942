"""Parameter groups, averaged weights, the trainer's own options, and the end of a run."""

import copy
import csv
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from tests.conftest import ROOT, Upright
from tests.training.test_classifier import trainer
from upright.architectures.lenet import LeNet
from upright.architectures.resnet import SmallResNet
from upright.architectures.spatial_transformer import SpatialTransformer
from upright.architectures.transformer_network import TransformerNetwork
from upright.data.digits import Digits
from upright.errors import UprightError
from upright.training.classifier import ImageClassifier
from upright.training.losses import CrossEntropy
from upright.training.optimisation import Muon, grouped_optimizer, orthogonalised
from upright.training.restoring import restore

STN, LENET = ROOT / "configs/stn_lenet.yaml", ROOT / "configs/lenet.yaml"
QUICK = ("--trainer.max_epochs", 1, "--trainer.limit_train_batches", 4, "--wandb", "off")
EMA = "lightning.pytorch.callbacks.EMAWeightAveraging"
SPEC = Digits(size=12, margin=0).spec
OPTIMISERS = {
    "SGD": partial(torch.optim.SGD, lr=0.01, weight_decay=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.1),
    "Nesterov": partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, weight_decay=0.1),
    "Adam": partial(torch.optim.Adam, lr=0.01, weight_decay=0.1),
    "AdamW": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "NAdam": partial(torch.optim.NAdam, lr=0.01, weight_decay=0.1),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.01, weight_decay=0.1),
    "Muon": partial(Muon, lr=0.01, weight_decay=0.1),
}
STNET = partial(
    TransformerNetwork,
    network=partial(SmallResNet, depth=8, width=4),
    transformer=partial(SpatialTransformer, lr_factor=0.1),
)


class TiedNetwork(nn.Module):
    """A network with an embedding without weight decay, and with the same layer twice."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, input_shape[1] ** 2)
        self.embedding.no_weight_decay = True
        self.layer = nn.Linear(input_shape[1] ** 2, num_classes)
        self.again = self.layer

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.flatten(1) + self.embedding.weight[0])


@pytest.mark.parametrize("optimiser", OPTIMISERS.values(), ids=OPTIMISERS)
def test_norms_and_biases_have_no_weight_decay(optimiser: object) -> None:
    classifier = ImageClassifier(SPEC, STNET, optimiser)
    groups = grouped_optimizer(classifier.model, classifier.optimizer).param_groups
    names = {parameter: name for name, parameter in classifier.model.named_parameters()}
    grouped = [names[parameter] for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    settings = sorted((round(group["lr"], 6), group["weight_decay"]) for group in groups)
    assert settings == [(0.001, 0.0), (0.001, 0.1), (0.01, 0.0), (0.01, 0.1)]
    for group in groups:
        assert all(parameter.ndim > 1 for parameter in group["params"]) == (group["weight_decay"] > 0)
        slow = {".transformer." in f".{names[parameter]}" for parameter in group["params"]}
        assert slow == {group["lr"] < 0.005}
    # Without a gradient, only parameters with weight decay change.
    before = {name: parameter.detach().clone() for name, parameter in classifier.model.named_parameters()}
    optimizer = grouped_optimizer(classifier.model, classifier.optimizer)
    for parameter in classifier.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in classifier.model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (parameter.ndim > 1 and bool(before[name].any())), name


def test_a_module_can_exempt_its_parameters_and_shared_ones_count_once() -> None:
    classifier = ImageClassifier(SPEC, TiedNetwork, OPTIMISERS["AdamW"])
    decaying, exempt = grouped_optimizer(classifier.model, classifier.optimizer).param_groups
    network = classifier.model.network
    assert [id(p) for p in decaying["params"]] == [id(network.layer.weight)]
    assert {id(p) for p in exempt["params"]} == {id(network.embedding.weight), id(network.layer.bias)}


@pytest.mark.parametrize(
    "optimiser",
    [partial(torch.optim.Adam, lr=0.01), partial(torch.optim.Rprop, lr=0.01)],
    ids=["weight decay 0", "no option"],
)
def test_without_weight_decay_there_is_one_group(optimiser: object) -> None:
    classifier = ImageClassifier(SPEC, LeNet, optimiser)
    assert len(grouped_optimizer(classifier.model, classifier.optimizer).param_groups) == 1
    fit = trainer(max_steps=2, limit_val_batches=0)
    fit.fit(classifier, Digits(size=12, margin=0))
    assert float(fit.callback_metrics["train/loss"]) > 0


@pytest.mark.parametrize("name", ["SGD", "momentum", "Nesterov", "Adam", "AdamW"])
def test_fused_and_unfused_steps_are_equal(name: str) -> None:
    results = []
    for options in ({}, {"fused": False}, {"foreach": True}):
        torch.manual_seed(0)
        classifier = ImageClassifier(SPEC, STNET, partial(OPTIMISERS[name], **options))
        optimizer = grouped_optimizer(classifier.model, classifier.optimizer)
        assert {group["fused"] for group in optimizer.param_groups} == {not options or options.get("fused")}
        for _ in range(3):
            for parameter in classifier.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        results.append(dict(classifier.named_parameters()))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


@pytest.mark.parametrize("shape", [(16, 16), (32, 72), (72, 32)])
def test_muon_steps_are_orthogonal(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    values = (u.T @ orthogonalised(matrix) @ v.T).diagonal()
    assert 0.6 < values.min() <= values.max() < 1.25


def test_muon_leaves_all_but_matrices_to_adamw() -> None:
    steps = {}
    for kind in (Muon, torch.optim.AdamW):
        torch.manual_seed(0)
        network = SmallResNet((3, 12, 12), 10, depth=8, width=16)
        optimizer = kind(network.parameters(), lr=0.01, weight_decay=0.1)
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
        before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        optimizer.step()
        assert all(parameter.grad is not None for parameter in network.parameters())
        steps[kind] = {name: parameter - before[name] for name, parameter in network.named_parameters()}
    for name, step in steps[Muon].items():
        is_matrix = step.ndim > 1 and len(step) > 10
        assert torch.equal(step, steps[torch.optim.AdamW][name]) != is_matrix, name
        if is_matrix:
            # As large as a first step of AdamW, whose entries are the learning rate.
            assert 0.1 < step.square().mean().sqrt() / 0.01 < 0.4, name


def test_muon_goes_on_from_its_state() -> None:
    torch.manual_seed(0)
    network = SmallResNet((3, 12, 12), 10, depth=8, width=16)
    optimizer = Muon(network.parameters())

    def step(network: nn.Module, optimizer: Muon) -> None:
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter).cumsum(0)
        optimizer.step()

    step(network, optimizer)
    resumed = copy.deepcopy(network)
    other = Muon(resumed.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(network, optimizer)
    step(resumed, other)
    for ours, theirs in zip(network.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_optimisers_error_is_one_line() -> None:
    for optimiser, text in (
        (partial(torch.optim.SGD, lr=-1.0), r"model.optimizer: Invalid learning rate: -1.0"),
        (partial(torch.optim.SGD, lr=1.0, nesterov=True), r"model.optimizer: Nesterov momentum requires"),
        (partial(Muon, momentum=1.0), r"model.optimizer: momentum must be at least 0 and less than 1, got 1.0"),
    ):
        with pytest.raises(UprightError, match=text):
            grouped_optimizer(ImageClassifier(SPEC, LeNet, optimiser).model, optimiser)


def test_balanced_weights_come_from_the_training_images() -> None:
    classifier = ImageClassifier(SPEC, LeNet, OPTIMISERS["SGD"], loss=partial(CrossEntropy, class_weights="balanced"))
    fit = trainer(max_steps=1, limit_val_batches=0)
    data = Digits(size=12, margin=0)
    fit.fit(classifier, data)
    counts = data.samples("train")[:].labels.bincount()
    assert torch.allclose(classifier.loss.weight, counts.sum() / (10 * counts))
    images = torch.utils.data.DataLoader(data.samples("train"))
    with pytest.raises(UprightError, match=r"class_weights balanced needs an ImageDataModule, got NoneType: give"):
        trainer().fit(classifier, images, images)


def rows(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))


def weights(name: str, which: str = "last") -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = checkpoint(name, which)["state_dict"]
    return state


def checkpoint(name: str, which: str = "last") -> dict[str, object]:
    return torch.load(f"checkpoints/{name}/{which}.ckpt", weights_only=True)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, second[key]) for key, tensor in first.items())


OPTIONS = {
    "clipped by norm": ("--trainer.gradient_clip_val", 0.01),
    "clipped by value": ("--trainer.gradient_clip_val", 1e-4, "--trainer.gradient_clip_algorithm", "value"),
    "accumulated": ("--trainer.accumulate_grad_batches", 2),
    "bf16": ("--trainer.precision", "bf16-mixed"),
    "step": ("--model.scheduler", "upright.training.schedules.Step"),
    "cosine": ("--model.scheduler", "upright.training.schedules.Cosine", "--model.scheduler.warmup", 0.5),
    "constant": ("--model.scheduler", "upright.training.schedules.Constant"),
    "balanced": ("--model.loss.class_weights", "balanced"),
    "weighted": ("--model.loss.class_weights", "[1,1,1,1,1,1,1,1,1,9]"),
}


QUICK_OPTIONS = ("clipped by norm", "accumulated", "cosine", "balanced")


@pytest.mark.parametrize(
    "names",
    [QUICK_OPTIONS, pytest.param(sorted(OPTIONS.keys() - set(QUICK_OPTIONS)), marks=pytest.mark.slow)],
    ids=["quick", "others"],
)
def test_options_change_the_training_and_nothing_else(upright: Upright, tmp_path: Path, names: Sequence[str]) -> None:
    # Plain SGD, because the length of a gradient does not change Adam's steps.
    sgd = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", 0.1)
    fit = ("fit", "--config", LENET, *sgd, *QUICK)
    assert upright(*fit, "--name", "plain").code == 0
    assert upright(*fit, "--name", "same", "--trainer.deterministic", "true").code == 0
    assert equal(weights("plain"), weights("same"))
    for name in names:
        answer = upright(*fit, "--name", name, *OPTIONS[name])
        assert answer.code == 0, answer.err
        last = checkpoint(name)
        assert last["global_step"] == (2 if name == "accumulated" else 4)
        # The schedule is at its end, whatever the number of batches per step.
        assert last["lr_schedulers"][0]["last_epoch"] == last["global_step"]
        assert not equal(weights("plain"), weights(name)), name
        assert all(tensor.dtype == torch.float32 for tensor in weights(name).values())
        assert ("loss.weight" in weights(name)) == (name in ("balanced", "weighted"))
    assert upright("test", "--ckpt_path", f"checkpoints/{names[-1]}").code == 0


def test_early_stopping_stops_early(upright: Upright, tmp_path: Path) -> None:
    stop = {"class_path": "lightning.pytorch.callbacks.EarlyStopping"}
    stop["init_args"] = {"monitor": "val/loss", "min_delta": 100.0, "patience": 1}
    (tmp_path / "stop.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [stop]}}))
    answer = upright(
        "fit", "--config", LENET, "--config", "stop.yaml", "--name", "x", *QUICK, "--trainer.max_epochs", 9
    )
    assert answer.code == 0, answer.err
    assert len(rows(tmp_path / "checkpoints/x")) == 2
    assert re.search(r"Best: epoch [12] of 2 ", answer.out)


def test_averaged_weights_are_validated_tested_and_restored(upright: Upright, tmp_path: Path) -> None:
    average = {"class_path": EMA, "init_args": {"decay": 0.8}}
    (tmp_path / "ema.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [average]}}))
    quick = (*QUICK, "--trainer.max_epochs", 2)
    assert upright("fit", "--config", LENET, "--name", "plain", *quick).code == 0
    assert upright("fit", "--config", LENET, "--config", "ema.yaml", "--name", "ema", *quick).code == 0
    last = checkpoint("ema")
    # Averaging does not change the trained weights; the checkpoint's weights are the averaged ones.
    assert equal(last["current_model_state"], weights("plain")) and not equal(weights("ema"), weights("plain"))
    best = checkpoint("ema", "best")["upright"]["metrics"]
    assert upright("validate", "--ckpt_path", "checkpoints/ema").out.count(f"{best['val/loss']:.5f}"[:7]) == 1
    assert upright("test", "--ckpt_path", "checkpoints/ema").code == 0
    tested = json.loads(Path("checkpoints/ema/test.json").read_text())["metrics"]
    assert upright("test", "--ckpt_path", "checkpoints/plain").code == 0
    assert tested != json.loads(Path("checkpoints/plain/test.json").read_text())["metrics"]
    # `export` and other commands restore the same weights.
    assert equal(restore(Path("checkpoints/ema")).classifier.state_dict(), weights("ema", "best"))
    resume = ("fit", "--name", "ema", "--ckpt_path", "last", "--wandb", "off", "--trainer.max_epochs", 3)
    answer = upright(*resume, "--trainer.callbacks", "null")
    assert answer.code == 2 and "averages its weights and cannot resume without: add the callback" in answer.err
    assert upright(*resume).code == 0 and "averaging_state" in checkpoint("ema")


def test_a_run_cannot_resume_with_other_groups(upright: Upright, run_folder: Path) -> None:
    resume = ("fit", "--name", "small", "--ckpt_path", "last", "--trainer.max_epochs", 3, "--wandb", "off")
    last = torch.load(run_folder / "last.ckpt", weights_only=True)
    decaying, exempt = last["optimizer_states"][0]["param_groups"]
    # Like checkpoints from before norms and biases had a group of their own.
    last["optimizer_states"][0]["param_groups"] = [decaying | {"params": decaying["params"] + exempt["params"]}]
    torch.save(last, run_folder / "last.ckpt")
    answer = upright(*resume)
    assert answer.code == 2 and answer.err.count("\n") == 1
    total = len(decaying["params"]) + len(exempt["params"])
    assert f"has parameter groups of [{total}], and this run has [" in answer.err


def test_a_diverging_run_stops_and_keeps_its_earlier_checkpoints(upright: Upright, tmp_path: Path) -> None:
    sgd = ("--model.optimizer", "torch.optim.SGD", "--model.scheduler", "upright.training.schedules.Constant")
    fit = ("fit", "--config", LENET, "--wandb", "off", *sgd)
    answer = upright(*fit, "--model.optimizer.lr", 1e8, "--name", "at once")
    assert answer.code == 1 and answer.err.count("\n") == 1
    assert re.search(r"The run diverged: the loss is (nan|inf) at step \d+ \(epoch 1\)\. Lower --model", answer.err)
    assert answer.err.endswith("gradient_clip_val 1. No checkpoint had been written yet.\n")
    assert not (tmp_path / "checkpoints/at once").exists()
    assert upright(*fit, "--model.optimizer.lr", 0.01, "--name", "later", "--trainer.max_epochs", 1).code == 0
    before = Path("checkpoints/later/best.ckpt").read_bytes()
    # The optimiser's rate is restored from the checkpoint, so only broken data make the run diverge.
    (tmp_path / "broken.py").write_text(
        "from torch import nn\nclass Broken(nn.Module):\n    def forward(self, images):\n        return images / 0\n"
    )
    resume = ("--trainer.max_epochs", 2, "--data.augment", "[{class_path: broken.Broken}]", "--ckpt_path", "last")
    answer = upright("fit", "--name", "later", "--wandb", "off", *resume)
    assert answer.code == 1 and "diverged: the loss is nan at step 19 (epoch 2)" in answer.err
    folder = tmp_path / "checkpoints/later"
    earlier = f"Earlier checkpoints: '{folder / 'best.ckpt'}' and '{folder / 'last.ckpt'}'."
    assert earlier in answer.err and Path("checkpoints/later/best.ckpt").read_bytes() == before
    assert checkpoint("later")["global_step"] == 18


def test_weights_that_are_not_finite_are_not_saved(upright: Upright, tmp_path: Path) -> None:
    (tmp_path / "breaks.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n"
        "class Breaks(Callback):\n"
        "    def on_train_batch_end(self, trainer, module, *_):\n"
        "        next(module.parameters()).data.fill_(float('inf'))\n"
    )
    (tmp_path / "breaks.yaml").write_text("trainer: {callbacks: [{class_path: breaks.Breaks}]}")
    options = ("--save_every_n_steps", 1)
    answer = upright("fit", "--config", LENET, "--config", "breaks.yaml", "--name", "x", *QUICK, *options)
    assert answer.code == 1 and "the weights are not finite at step 1 (epoch 1)" in answer.err
    assert not (tmp_path / "checkpoints/x").exists()


def test_a_run_without_an_end_is_refused(upright: Upright, tmp_path: Path) -> None:
    answer = upright("fit", "--config", LENET, "--wandb", "off", "--trainer.max_epochs", -1)
    assert answer.code == 2 and "A schedule needs the length of the run: give --trainer.max_epochs" in answer.err
    assert list(tmp_path.iterdir()) == []


def test_the_summary_of_a_run(upright: Upright, tmp_path: Path) -> None:
    answer = upright("fit", "--config", STN, *QUICK, "--trainer.max_epochs", 2)
    (row, _) = rows(tmp_path / "checkpoints/stn_lenet")
    assert float(row["images_per_second"]) == pytest.approx(4 * 64 / float(row["seconds"]), rel=0.01)
    best, minutes, run, following = answer.out.splitlines()[-4:]
    pattern = r"Best: epoch [12] of 2  val/accuracy 0\.\d{4}  val/loss \d\.\d{4}  val/uprightness \d\.\d{4}"
    assert re.fullmatch(pattern, best)
    assert re.fullmatch(r"Time: (\d+ seconds|\d+\.\d minutes), [\d,]+ images per second", minutes)
    assert run == "Run:  checkpoints/stn_lenet"
    assert following == "Next: upright test --ckpt_path checkpoints/stn_lenet/best.ckpt"


def test_a_row_has_only_the_metrics_of_its_epoch(upright: Upright, tmp_path: Path) -> None:
    options = ("--log_grad_norm", "--trainer.max_epochs", 3, "--trainer.check_val_every_n_epoch", 2)
    answer = upright("fit", "--config", STN, *QUICK, *options)
    epochs = rows(tmp_path / "checkpoints/stn_lenet")
    assert [bool(row["val/loss"]) for row in epochs] == [False, True, False]
    norms = [(float(row["grad_norm/mean"]), float(row["grad_norm/max"])) for row in epochs]
    assert all(0 < mean <= maximum for mean, maximum in norms) and len(set(norms)) == 3
    assert len(re.findall(r"^epoch [123]/3 .*val/loss", answer.out, flags=re.M)) == 1
    run = tmp_path / "checkpoints/stn_lenet"
    best, last = (
        torch.load(run / f"{name}.ckpt", weights_only=True)["upright"]["metrics"] for name in ("best", "last")
    )
    assert best and all(name.startswith("val/") for name in best) and last == {}


def test_the_length_of_a_run_can_be_given_in_steps(upright: Upright, tmp_path: Path) -> None:
    steps = ("--wandb", "off", "--trainer.max_epochs", -1, "--trainer.max_steps", 3, "--trainer.limit_train_batches", 2)
    answer = upright("fit", "--config", LENET, *steps)
    assert answer.code == 0 and "epoch 1/2 " in answer.out and "epoch 2/2 " in answer.out
    assert [row["step"] for row in rows(tmp_path / "checkpoints/lenet")] == ["2", "3"]


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")
def test_a_run_without_validation_reports_it(upright: Upright, tmp_path: Path) -> None:
    answer = upright("fit", "--config", LENET, *QUICK, "--trainer.limit_val_batches", 0)
    assert answer.code == 0 and "Best: unknown, because nothing was validated; there is last.ckpt" in answer.out
    assert "upright test --ckpt_path checkpoints/lenet/last.ckpt" in answer.out


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SparseAdam])
def test_an_optimiser_that_cannot_train_is_refused(kind: Any) -> None:
    with pytest.raises(UprightError, match=rf"^model\.optimizer: {kind.__name__} takes no dense, .* use AdamW, SGD or"):
        grouped_optimizer(nn.Linear(2, 2), kind)
