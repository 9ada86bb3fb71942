"""A small network with the upright loss reaches the errors that the spatial transformer paper published.

Protocol: The tasks are those of the study ``transformer``, distorted anew at every step: R by default, and with
``--full`` also RTS, TC, E and P. The network is a SmallResNet of depth 8 and width 16 behind the transform that fits
the task (R rotation, RTS similarity, TC attention, E thin-plate 4 x 4, P projective). The localiser has 16 maps, and
the transformer outputs 20 x 20 pixels. The upright loss has weight 2. The networks have 86,507 (R) to 107,053 (TC)
parameters. There are 58,800 training images and 24 epochs, which is 1.4 million images in total; the paper used 38.4
million. The optimiser is AdamW with a one-cycle schedule that peaks at 0.003, weight decay 0.2, label smoothing 0.1 and
batches of 128. Convolutions compute in bfloat16. The other 1,200 training images choose the epoch to test. Each of the
10,000 test digits is distorted 3 times.

The paper does not define every detail of the tasks, so we chose the others (see `MNISTDistortion`). Our task P seems
harder than the paper's: LeNet's error on P is three times that on R (study ``transformer``), and the paper's CNN has
1.25 times.

The network and the weight decay were chosen by the validation error on R, with a fifth of the images and at most
864,000 images in total. LeNet had 0.96 %, the small ResNet 0.78 %, with weight decay 0.2 0.70 % (with 0.5 and 1: 0.78 %
and 0.77 %), and with elastic augmentation 1.03 %. A second transformer in series makes a step half as long again. After
384,000 images it had validation errors of 1.88 % (without it 1.94 %) on P and 0.90 % (without it 0.96 %) on RTS. The
test errors of these four runs were printed as well.

Some test errors were known before the protocol was written. A LeNet with 400,000 parameters had 0.84 % on R after 3.8
million images. Single seeds of this network, in 32-bit and after 1.9 to 2.4 million images, had 0.54 % and 0.65 % on R,
0.71 % and 0.76 % on RTS, 1.47 % on P and 1.12 % on TC.

The claim holds if, on every task, the mean error over the seeds is at most the published error. The published error is
that of the paper's best network (mean of 3 runs, one decimal).
"""

from collections.abc import Callable
from functools import partial

from torch.optim import AdamW

from upright.architectures.localisers import ConvLocaliser
from upright.architectures.resnet import SmallResNet
from upright.data.datamodule import ImageDataModule
from upright.data.distorted_mnist import Task
from upright.evidence.bench import Bench, Experiment, transformed
from upright.evidence.finding import Finding, draw_points, errors, means, metric, panels, rows, spreads
from upright.evidence.studies.transformer import FITTING, PUBLISHED, ROTATED, digits, draw_published, mnist
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
    tasks: tuple[Task, ...] = bench.choose(("R",), ("R",), ("R", "RTS", "TC", "E", "P"))
    data, epochs = bench.choose(digits, mnist), bench.choose(1, 24)
    runs = bench.train({task: experiment(task, data(task), epochs) for task in tasks})
    error, uprightness = errors(metric(runs, "test/accuracy")), metric(runs, "test/uprightness")
    mean = means(error)
    missed = [task for task in tasks if mean[task] > PUBLISHED[task]]
    reached = [task for task in tasks if task not in missed]
    sentence = (
        ", ".join(f"{task} {mean[task]:.2f} % (published: {PUBLISHED[task]})" for task in tasks)
        + f". Reached on {', '.join(reached) or 'none'}; missed on {', '.join(missed) or 'none'}."
    )
    columns: dict[str, dict[Task, str]] = {
        "transform": {task: FITTING[task].replace("_", "-") for task in tasks},
        "error, %": spreads(error, 2),
        "published, %": {task: f"{PUBLISHED[task]}" for task in tasks},
        "uprightness": spreads({task: uprightness[task] for task in ROTATED if task in uprightness}, 3),
    }
    figure, (axis,) = panels(1, width=3 + len(tasks), height=3.4)
    draw_points(axis, error, "test error, %", tasks)
    draw_published(axis, tasks)
    axis.set_ylim(0, None)
    numbers = {"error": error, "uprightness": uprightness, "published": PUBLISHED}
    return Finding(not missed, sentence, rows("task", tasks, columns), figure, numbers)
