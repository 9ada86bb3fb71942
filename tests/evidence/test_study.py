import inspect
import json
import pkgutil
import signal
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure

from tests.conftest import ROOT, Upright
from upright.architectures.lenet import LeNet
from upright.architectures.perceptron import Perceptron
from upright.data.digits import Digits
from upright.errors import UprightError
from upright.evidence import studies
from upright.evidence.bench import Bench, Experiment, Run
from upright.evidence.finding import Finding, mean_and_spread, panels
from upright.evidence.studies import depth, kernel, published, transformer, uprightness
from upright.evidence.study import claim_and_protocol, run
from upright.tables import read_rows
from upright.training.restoring import restore

STUDIES = [module.name for module in pkgutil.iter_modules(studies.__path__)]
LONG = (
    "any_angle",
    "depth",
    "pooling",
    "regularisation",
    "residual",
    "sampling",
    "transfer",
    "transformer",
    "uprightness",
)
PERCEPTRON = Experiment(Perceptron, partial(Digits, angles=(0, 30)), epochs=1)


@pytest.mark.usefixtures("fewer_digits")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in STUDIES]
)
def test_every_study_writes_its_results(name: str, upright: Upright, tmp_path: Path) -> None:
    answer = upright("study", name, "--quick", "--seeds", 2)
    assert answer.code == 0, answer.err
    folder = tmp_path / f"checkpoints/study-{name}-quick"
    results = json.loads((folder / "results.json").read_text())
    assert results["numbers"] and results["held"] in (True, False) and results["scale"] == "quick"
    page = (folder / "study.md").read_text()
    verdict = "Held" if results["held"] else "Did not hold"
    assert page.startswith(f"## {name}\n\n{results['claim']}\n\nProtocol: ")
    assert "The claim holds if" in page and f"**{verdict}.** {results['sentence']}" in page
    assert f"`upright study {name} --seeds 2 --quick`" in page
    assert "A quick study does not follow its protocol" in page and (folder / f"{name}.png").stat().st_size > 5000
    # The protocol is printed before the results.
    assert answer.out.index("Protocol: ") < answer.out.index(results["sentence"])


def test_the_list_has_every_claim(upright: Upright) -> None:
    out = upright("study").out
    assert [line.split()[0] for line in out.splitlines()] == STUDIES
    assert "A perceptron cannot learn XOR" in out


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_of_the_studies_has_the_claim_and_the_protocol_of_each(name: str) -> None:
    page = (ROOT / "docs/explanation/studies.md").read_text()
    claim, protocol = claim_and_protocol(import_module(f"{studies.__name__}.{name}"))
    assert f"## {name}\n\n{claim}\n\n{protocol}\n\n|" in page and f"`upright study {name} --seeds 3" in page


def test_a_protocol_keeps_its_list() -> None:
    module = ModuleType("study", "The claim.\n\nProtocol: one\ntwo.\n\n- three\n  four\n- five\n")
    assert claim_and_protocol(module) == ("The claim.", "Protocol: one two.\n\n- three four\n- five")


class FakeUprightness(Bench):
    """A bench that returns runs with this uprightness, by variant."""

    def __init__(self, folder: Path, uprightness: dict[str, list[float]]) -> None:
        super().__init__(folder, 2, "quick")
        self.uprightness = uprightness

    def train(self, variants: object) -> dict[str, list[Run]]:
        return {
            key: [
                Run(self.folder, {"test/accuracy": 0.98 + i / 100, "test/uprightness": v}, 1)
                for i, v in enumerate(each)
            ]
            for key, each in self.uprightness.items()
        }


def test_the_verdict_and_the_sentence_match_the_numbers(tmp_path: Path) -> None:
    lenet = {"lenet": [1.0, 1.0]}
    held = uprightness.run(FakeUprightness(tmp_path, lenet | {"transformer": [0.2, 0.3], "upright": [0.1, 0.19]}))
    assert held.held and "The upright loss lowers the uprightness" in held.sentence
    assert "from 0.250 to 0.145 (every run" in held.sentence
    assert held.table[2]["uprightness"] == "0.145 ± 0.064" and held.table[2]["test accuracy"] == "0.9850 ± 0.0071"
    not_held = uprightness.run(FakeUprightness(tmp_path, lenet | {"transformer": [0.2, 0.3], "upright": [0.1, 0.21]}))
    assert not not_held.held and "does not clearly lower" in not_held.sentence and "(not every run" in not_held.sentence


def test_published_errors_are_reached_or_missed_by_the_mean(tmp_path: Path) -> None:
    class FakeErrors(Bench):
        def train(self, variants: object) -> dict[str, list[Run]]:
            accuracies = {
                "R": (0.9931, 0.9930),
                "RTS": (0.9950, 0.9949),
                "TC": (0.99, 0.99),
                "E": (0.99, 0.99),
                "P": (1, 1),
            }
            return {
                task: [Run(self.folder, {"test/accuracy": share, "test/uprightness": 0.1}, 1) for share in shares]
                for task, shares in accuracies.items()
                if task in variants  # type: ignore[operator]
            }

    full = published.run(FakeErrors(tmp_path, 2, "full"))
    assert not full.held and full.sentence.endswith("Reached on R, TC, E, P; missed on RTS.")
    assert [row["error, %"] for row in full.table][:2] == ["0.70 ± 0.01", "0.50 ± 0.01"]
    assert [row["uprightness"] == "-" for row in full.table] == [False, False, True, True, False]
    standard = published.run(FakeErrors(tmp_path, 2, "standard"))
    assert standard.held and standard.sentence.endswith("Reached on R; missed on none.")


class FakeAccuracies(Bench):
    """A bench that returns runs with these accuracies on the test split, by variant."""

    def __init__(self, folder: Path, accuracies: dict[tuple[str, Any], tuple[float, float]]) -> None:
        super().__init__(folder, 2, "quick")
        self.accuracies = accuracies
        (folder / "metrics.csv").write_text("epoch,train/loss\n0,0.5\n")

    def train(self, variants: object) -> dict[tuple[str, Any], list[Run]]:
        return {key: [Run(self.folder, {"test/accuracy": v}, 1) for v in each] for key, each in self.accuracies.items()}


def test_deep_is_better_if_every_deep_run_is_above_every_shallow_one(tmp_path: Path) -> None:
    shallow = {("MLP", 1): (0.90, 0.91), ("CNN", 1): (0.95, 0.96)}
    held = depth.run(FakeAccuracies(tmp_path, shallow | {("MLP", 4): (0.92, 0.93), ("CNN", 4): (0.97, 0.98)}))
    assert held.held and "not" not in held.sentence
    one_below = depth.run(FakeAccuracies(tmp_path, shallow | {("MLP", 4): (0.905, 0.93), ("CNN", 4): (0.97, 0.98)}))
    assert (
        not one_below.held
        and "MLPs with 100,000 parameters are not clearly better if they are deep" in one_below.sentence
    )
    assert "CNNs with 30,000 parameters are better if they are deep" in one_below.sentence


def test_transformers_are_in_order_by_their_means(tmp_path: Path) -> None:
    accuracies = {
        ("R", "cnn"): (0.90, 0.92),
        ("R", "affine"): (0.95, 0.95),
        ("R", "spline"): (0.96, 0.96),
        ("R", "upright"): (0.97, 0.97),
    }
    held = transformer.run(FakeAccuracies(tmp_path, accuracies))
    assert held.held and "CNN 9.00 %" in held.sentence and held.sentence.endswith("The claimed order holds on R.")
    for wrong in ({("R", "spline"): (0.971, 0.971)}, {("R", "affine"): (0.90, 0.91)}):
        not_held = transformer.run(FakeAccuracies(tmp_path, accuracies | wrong))
        assert not not_held.held and not_held.sentence.endswith("The claimed order holds on none.")


def test_a_cosine_that_is_never_reached_is_none_of_the_steps() -> None:
    assert kernel.summary([100, None, 200]) == "2 of 3 runs reached 0.999, after 150 steps on average"
    assert kernel.summary([None, None]) == "0 of 2 runs reached 0.999"


def test_complete_runs_are_not_repeated(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 2, "quick")
    runs = bench.train({"a": PERCEPTRON})["a"]
    assert [each.folder.name for each in runs] == ["a-0", "a-1"]
    assert runs[0].metrics == json.loads((tmp_path / "a-0/test.json").read_text())["metrics"]
    assert runs[0].metrics != runs[1].metrics and len(runs[0].column("val/loss")) == 1
    assert isinstance(restore(runs[0].folder).classifier.model.network, Perceptron)
    tested = (runs[0].metrics["test/loss"], runs[0].metrics["test/accuracy"])
    assert runs[0].loss_and_accuracy("test") == pytest.approx(tested, abs=1e-6)
    config = yaml.safe_load((tmp_path / "a-1/config.yaml").read_text())
    assert config["seed_everything"] == 1 and config["model"]["network"]["class_path"].endswith("Perceptron")
    written = (tmp_path / "a-0/best.ckpt").stat().st_mtime_ns
    again = Bench(tmp_path, 2, "quick")
    assert again.train({"a": PERCEPTRON})["a"] == runs
    # The time of the study includes the time of complete runs.
    assert again.seconds == sum(run.seconds for run in runs) > 0
    assert (tmp_path / "a-0/best.ckpt").stat().st_mtime_ns == written
    # Another experiment with the same name replaces the run.
    other = Bench(tmp_path, 2, "quick").train({"a": PERCEPTRON._replace(epochs=2)})["a"]
    assert len(other[0].column("val/loss")) == 2


class StopOnce(Callback):
    """Raise the signal of Ctrl-C in the second epoch, once."""

    stopped = False

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.current_epoch == 1 and not StopOnce.stopped:
            StopOnce.stopped = True
            signal.raise_signal(signal.SIGINT)


def test_an_interrupted_run_resumes(tmp_path: Path) -> None:
    experiment = PERCEPTRON._replace(epochs=3, callbacks=(StopOnce,))
    with pytest.raises(KeyboardInterrupt):
        Bench(tmp_path / "stopped", 1, "quick").train({"a": experiment})
    first = (tmp_path / "stopped/a-0/metrics.csv").read_text()
    assert StopOnce.stopped and first.count("\n") == 2
    (run,) = Bench(tmp_path / "stopped", 1, "quick").train({"a": experiment})["a"]
    assert (run.folder / "metrics.csv").read_text().startswith(first)
    assert run.seconds > float(read_rows(run.folder / "metrics.csv")[0]["seconds"])
    again = Bench(tmp_path / "stopped", 1, "quick")
    again.train({"a": experiment})
    assert again.seconds == run.seconds
    (uninterrupted,) = Bench(tmp_path / "uninterrupted", 1, "quick").train({"a": experiment})["a"]
    assert run.metrics == uninterrupted.metrics


def test_a_mistake_in_an_experiment_names_its_run(tmp_path: Path) -> None:
    wrong = PERCEPTRON._replace(network=partial(LeNet, pooling="mean"))
    with pytest.raises(UprightError, match=r"^wrong-0: .*pooling"):
        Bench(tmp_path, 2, "quick").train({"wrong": wrong})


def test_other_initial_weights_are_another_experiment(tmp_path: Path) -> None:
    start = tmp_path / "best.ckpt"
    start.write_bytes(b"a")
    experiment = PERCEPTRON._replace(start_from=start, precision="bf16-mixed")
    before = experiment.config(0)
    assert yaml.safe_load(before)["start_from"] == str(start)
    assert yaml.safe_load(before)["trainer"]["precision"] == "bf16-mixed"
    assert experiment.config(0) == before
    start.write_bytes(b"b")
    assert experiment.config(0) != before


def test_values_by_scale() -> None:
    choices = {scale: Bench(Path(), 2, scale).choose(1, 2) for scale in ("quick", "standard", "full")}
    assert choices == {"quick": 1, "standard": 2, "full": 2}
    assert Bench(Path(), 2, "full").choose(1, 2, 3) == 3


def test_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uprightness, "run", lambda bench: Finding(False, "No.", [{"a": "1"}, {"a": "2"}], Figure(), 3))
    run(uprightness, tmp_path / "s", 4, "standard")
    page = (tmp_path / "s/study.md").read_text()
    assert "| a   |\n| --- |\n| 1   |\n| 2   |\n" in page and "**Did not hold.** No.\n" in page
    assert "A quick study" not in page
    assert "`upright study uprightness --seeds 4`: 0 seconds of processor time, 4 seeds.\n" in page
    assert json.loads((tmp_path / "s/results.json").read_text())["held"] is False
    assert inspect.cleandoc(uprightness.__doc__ or "").split("\n\n")[0].replace("\n", " ") in page


def test_a_stopped_study_prints_how_to_resume(upright: Upright, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(bench: Bench) -> Finding:
        raise KeyboardInterrupt

    monkeypatch.setattr(uprightness, "run", stopped)
    answer = upright("study", "uprightness", "--quick")
    assert answer.code == 130 and "The same command resumes from the runs in" in answer.err
    assert "checkpoints/study-uprightness-quick.\nupright: stopped." in answer.err


def test_locks_of_killed_workers_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(bench: Bench, *_: object) -> list[Run]:
        (tmp_path / ".a-1.running").touch()
        raise KeyboardInterrupt

    complete = Bench(tmp_path, 1, "quick").train({"a": PERCEPTRON})
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Bench, "map", kill)
        Bench(tmp_path, 2, "standard").train({"a": PERCEPTRON})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-0", "a-0.yaml"]
    assert Bench(tmp_path, 1, "quick").train({"a": PERCEPTRON}) == complete


def test_all_ticks_have_the_same_font_size() -> None:
    figure, (axis,) = panels(1)
    axis.set_yscale("log")
    axis.set_ylim(2, 7)
    figure.canvas.draw()
    ticks = (*axis.yaxis.get_minor_ticks(), *axis.yaxis.get_major_ticks())
    assert {tick.label1.get_fontsize() for tick in ticks} == {8}


def test_the_spread_of_one_or_none() -> None:
    assert mean_and_spread([]) == "-" and mean_and_spread([1.0, 3.0], 2) == "2.00 ± 1.41"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["uprigthness"], "There is no study 'uprigthness'. Did you mean 'uprightness'?"),
        (["xor", "--seeds", "1"], "--seeds must be at least 2 to show a spread, got 1."),
        (["xor", "--quick", "--full"], "--quick and --full exclude each other"),
        (["xor", "--full"], "Study 'xor' has no larger scale; omit --full."),
        (["--quick"], "--quick needs the name of a study, one of any_angle, capacity,"),
    ],
)
def test_mistakes(arguments: list[str], message: str, upright: Upright) -> None:
    answer = upright("study", *arguments)
    assert answer.code == 2 and message in answer.err and "Traceback" not in answer.err
