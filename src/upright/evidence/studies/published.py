"""With the upright loss a small network reaches the errors that the spatial transformer's paper published.

Protocol: the tasks of the study ``transformer``, made from MNIST anew at every step: R by default, with ``--full`` RTS,
TC, E and P as well. SmallResNet of depth 8 and width 16 behind what the task asks for (R rotation, RTS similarity, TC
attention, E thin-plate 4 x 4, P projective), which has 16 maps in its localiser and shows it 20 x 20 pixels; upright
loss of weight 2; 86,507 (R) to 107,053 (TC) parameters. 58,800 training images, 24 epochs: 1.4 million images seen, for
the paper's 38.4 million. AdamW at 0.003, weight decay 0.2, one cycle, label smoothing 0.1, batches of 128, convolutions
in bfloat16. The epoch that is best on the other 1,200 training images is tested, on each of the 10,000 test digits
distorted 3 times. What the paper does not say of the tasks was chosen here (see `MNISTDistortion`): P is harder so than
it seems to have been there, for LeNet errs three times as often on it as on R (study ``transformer``), the paper's CNN
1.25 times.

Network and weight decay were chosen by R's validation on a fifth of the images, after at most 864,000: LeNet 0.96 %,
the small ResNet 0.78, with weight decay 0.2 0.70 (0.5 and 1: 0.78 and 0.77), with elastic augmentation 1.03. A second
transformer in series, which makes a step half as long again, was tried by validation after 384,000 images: 1.88 % for
1.94 on P, 0.90 for 0.96 on RTS (the test errors of these four were printed, too). A LeNet of 400,000 parameters had
erred on R by 0.84 % of the test split after 3.8 million images. Single seeds of this network had been tested before the
protocol was written, in 32-bit and after 1.9 to 2.4 million images: R 0.54 and 0.65 %, RTS 0.71 and 0.76, P 1.47, TC
1.12.

It holds if on every task the mean error over seeds is at most the published one, which is that of the best of the
paper's networks (mean of 3 runs, one decimal).
"""

from collections.abc import Callable
from functools import partial

from torch.optim import AdamW

from upright.architectures.resnet import SmallResNet
from upright.architectures.spatial_transformer import ConvLocaliser
from upright.data.datamodule import ImageDataModule
from upright.data.distorted_mnist import Task
from upright.evidence.bench import Bench, Experiment, transformed
from upright.evidence.finding import Finding, errors, means, measured, panels, rows, spreads
from upright.evidence.studies.transformer import FITTING, PUBLISHED, ROTATED, digits, draw_published, mnist
from upright.runs.drawing import COLOURS
from upright.training.losses import CrossEntropy


def experiment(task: Task, data: Callable[[], ImageDataModule], epochs: int) -> Experiment:
    """Return the small ResNet behind the transform that fits a task."""
    network, localiser = partial(SmallResNet, depth=8, width=16), partial(ConvLocaliser, width=16)
    return Experiment(
        transformed(FITTING[task], network, output_size=(20, 20), localiser=localiser),
        data,
        epochs,
        optimizer=partial(AdamW, lr=0.003, weight_decay=0.2),
        loss=partial(CrossEntropy, label_smoothing=0.1),
        upright_weight=2.0,
        precision="bf16-mixed",
    )


def run(bench: Bench) -> Finding:
    """Train the network on the tasks."""
    tasks: tuple[Task, ...] = bench.choose(("R",), ("R",), ("R", "RTS", "TC", "E", "P"))
    data, epochs = bench.choose(digits, mnist), bench.choose(1, 24)
    runs = bench.train({task: experiment(task, data(task), epochs) for task in tasks})
    error, uprightness = errors(runs), measured(runs, "test/uprightness")
    mean = means(error)
    missed = [task for task in tasks if mean[task] > PUBLISHED[task]]
    reached = [task for task in tasks if task not in missed]
    sentence = (
        ", ".join(f"{task} {mean[task]:.2f} % (published: {PUBLISHED[task]})" for task in tasks)
        + f": reached on {', '.join(reached) or 'none'}, missed on {', '.join(missed) or 'none'}."
    )
    columns = {
        "transform": {str(task): FITTING[task].replace("_", "-") for task in tasks},
        "error, %": spreads(error, 2),
        "published, %": {str(task): f"{PUBLISHED[task]}" for task in tasks},
        "uprightness": spreads({task: uprightness[task] for task in ROTATED if task in uprightness}, 3),
    }
    figure, (axis,) = panels(1, width=3 + len(tasks), height=3.4)
    for index, task in enumerate(tasks):
        label = "" if index else "upright loss, each seed"
        axis.scatter([index] * len(error[task]), error[task], s=20, color=COLOURS[0], label=label, zorder=3)
    draw_published(axis, tasks)
    axis.set_ylim(0, None)
    table = rows("task", {task: task for task in runs}, columns)
    return Finding(
        not missed, sentence, table, figure, {"error": error, "uprightness": uprightness, "published": PUBLISHED}
    )
