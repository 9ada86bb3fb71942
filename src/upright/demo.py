"""``upright demo``: run all steps once, by the commands that a user would type."""

import json
import shlex
from pathlib import Path

from upright.cli import main
from upright.data.datamodule import ImageDataModule
from upright.exporting.records import write_png
from upright.runtime.predictor import Predictor
from upright.training.restoring import restore


def demo(name: str = "demo") -> int:
    """Train, test, export, verify and infer on real digits rotated at random, and print the results.

    The run and the bundle of this name are replaced.
    """
    run, bundle = Path("checkpoints", name), Path("export", name)
    images = run / "test-images"
    steps = (
        ["fit", "--config", "stn_lenet", "--name", name, "--force"],
        ["test", "--ckpt_path", str(run / "best.ckpt")],
        ["export", str(run), "--name", name, "--force"],
        ["verify", str(bundle)],
    )
    for step in steps:
        if code := _print_and_run(step):
            return code
    labels = _write_test_images(images, restore(run).image_data("The demo needs originals"))
    examples = [str(path) for path in list(labels)[:: len(labels) // 8][:8]]
    if code := _print_and_run(["infer", str(bundle), *examples]):
        return code
    predictions = Predictor(bundle).predict(list(labels))
    correct = sum(prediction.label == label for prediction, label in zip(predictions, labels.values(), strict=True))
    metrics = json.loads((run / "test.json").read_text())["metrics"]
    deviation = metrics["test/relative_degrees_median"]
    print(f"""
Accuracy on {len(labels)} test images
  PyTorch, from the datamodule    {metrics["test/accuracy"]:.4f}
  ONNX Runtime, from PNG files    {correct / len(labels):.4f}
Uprightness                       {metrics["test/uprightness"]:.3f}   (0: rotates all images upright, 1: rotates none)
Median deviation                  {deviation:.1f}     (degrees, from the mean angle of the image's views)

Run      {run}
Bundle   {bundle}
Images   {images}
Plot     {run / "test_transformer.png"}""")
    return 0


def _print_and_run(arguments: list[str]) -> int:
    print(f"\n$ upright {shlex.join(arguments)}", flush=True)
    return main(arguments)


def _write_test_images(folder: Path, data: ImageDataModule) -> dict[Path, str]:
    """Write the test split as ``folder/<class>/<name>.png``. Return the class of each path."""
    labels = {}
    for original in data.originals("test"):
        label = data.spec.classes[original.label]
        path = folder / label / f"{original.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, original.pixels)
        labels[path] = label
    return labels
