"""Schedule-free optimisers: gradients at one point, evaluation and checkpoints at another (arXiv:2405.15682)."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from tests.conftest import ROOT, Upright
from upright.architectures.lenet import LeNet
from upright.data.digits import Digits
from upright.training.classifier import ImageClassifier
from upright.training.schedules import Constant

QUIET = dict.fromkeys(("enable_checkpointing", "logger", "enable_progress_bar", "enable_model_summary"), False)


class ScheduleFreeSGD(torch.optim.Optimizer):
    """SGD on ``z``, whose mean is ``x``; gradients are at ``y``, between both. The protocol is schedulefree's."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "train_mode": False, "k": 0})

    def _move(self, weight: float, *, train_mode: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] == train_mode:
                continue
            for parameter in group["params"]:
                if "z" in self.state[parameter]:
                    parameter.data.lerp_(self.state[parameter]["z"], weight)
            group["train_mode"] = train_mode

    def train(self) -> None:
        self._move(1 - self.param_groups[0]["beta"], train_mode=True)

    def eval(self) -> None:
        self._move(1 - 1 / self.param_groups[0]["beta"], train_mode=False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            assert group["train_mode"], "the gradient is not at y"
            group["k"] += 1
            for y in group["params"]:
                z = self.state[y].setdefault("z", y.clone())
                x = y.lerp(z, 1 - 1 / group["beta"])
                z.sub_(y.grad, alpha=group["lr"])
                y.copy_(x.lerp_(z, 1 / group["k"]).lerp_(z, 1 - group["beta"]))
        return loss


class Save(L.Callback):
    """Save a checkpoint after one step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def data() -> Digits:
    return Digits(size=16, batch_size=128)


def classifier(optimizer: Any = ScheduleFreeSGD) -> ImageClassifier:
    torch.manual_seed(0)
    lenet = partial(LeNet, widths=(2, 4, 8, 8))
    return ImageClassifier(data().spec, lenet, partial(optimizer, lr=0.1), Constant)


def fit(folder: Path, model: ImageClassifier, *callbacks: L.Callback, resume: Path | None = None) -> L.Trainer:
    trainer = L.Trainer(default_root_dir=folder, accelerator="cpu", max_epochs=2, callbacks=list(callbacks), **QUIET)
    trainer.fit(model, data(), ckpt_path=resume, weights_only=True)
    return trainer


def weights(model: ImageClassifier) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


PACKAGE = [
    pytest.param(name, marks=pytest.mark.ecosystem)
    for name in ("AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree")
]


@pytest.mark.parametrize("kind", ["own", *PACKAGE])
def test_checkpoints_hold_the_weights_of_evaluation_and_resume_exactly(kind: str, tmp_path: Path) -> None:
    optimizer = ScheduleFreeSGD if kind == "own" else getattr(pytest.importorskip("schedulefree"), kind)
    plain, model = classifier(optimizer), classifier(optimizer)
    fit(tmp_path, plain)
    path = tmp_path / "step.ckpt"
    # An epoch has 9 steps, so this one is within the second.
    trainer = fit(tmp_path, model, Save(13, path))
    assert torch.equal(weights(plain), weights(model))  # to save a checkpoint changes nothing
    # After training, the model has the weights of evaluation.
    (state,) = trainer.optimizers
    assert not any(group["train_mode"] for group in state.param_groups)
    accuracy = float(trainer.callback_metrics["val/accuracy"])
    (measured,) = trainer.validate(model, data(), verbose=False)
    assert measured["val/accuracy"] == pytest.approx(accuracy) and torch.equal(weights(plain), weights(model))

    checkpoint = torch.load(path, weights_only=True)
    x, y = checkpoint["state_dict"], checkpoint["training_weights"]
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["train_mode"]
    name, beta = next(name for name, _ in model.named_parameters()), 0.9
    z = checkpoint["optimizer_states"][0]["state"][0]["z"]
    torch.testing.assert_close(y[name], (1 - beta) * z + beta * x[name])
    assert not torch.equal(x[name], y[name])
    restored = ImageClassifier.load_from_checkpoint(path)
    assert torch.equal(weights(restored), torch.cat([x[name].flatten() for name, _ in model.named_parameters()]))

    resumed = classifier(optimizer)
    fit(tmp_path, resumed, resume=path)
    assert torch.equal(weights(resumed), weights(plain))


@pytest.mark.ecosystem
def test_the_config_of_the_docs_trains_and_exports(upright: Upright) -> None:
    pytest.importorskip("schedulefree")
    page = (ROOT / "docs/how-to/fine-tune.md").read_text(encoding="utf-8")
    (content,) = re.findall(r"^# schedule_free.yaml\n(.*?)^```", page, flags=re.M | re.S)
    Path("averaged.yaml").write_text(content)
    fit = (
        *("fit", "--config", ROOT / "configs/lenet.yaml", "--config", "averaged.yaml", "--wandb", "off"),
        *("--save_every_n_steps", 5, "--trainer.max_epochs"),
    )
    assert upright(*fit, 2, "--name", "complete").code == upright(*fit, 1, "--name", "averaged").code == 0
    resume = ("fit", "--wandb", "off", "--ckpt_path", "checkpoints/averaged/last.ckpt", "--trainer.max_epochs", 2)
    answer = upright(*resume, "--model.optimizer.warmup_steps", 10)
    assert answer.code == 2 and "was trained with model.optimizer.init_args.warmup_steps 50" in answer.err
    assert upright(*resume).code == 0
    paths = [f"checkpoints/{name}/last.ckpt" for name in ("complete", "averaged")]
    complete, resumed = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
    assert all(torch.equal(complete[name], resumed[name]) for name in complete)
    assert upright("test", "--ckpt_path", "checkpoints/averaged").code == 0
    answer = upright("export", "checkpoints/averaged")
    assert answer.code == 0, answer.err


def test_other_optimisers_have_one_set_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "step.ckpt"
    fit(tmp_path, classifier(torch.optim.SGD), Save(13, path))
    assert "training_weights" not in torch.load(path, weights_only=True)
