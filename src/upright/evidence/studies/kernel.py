"""A kernel need not be designed: from pictures and an edge detector's answers to them, gradient descent recovers it.

Protocol: 256 pictures and the answers of a 3 x 3 kernel to them (Sobel's edges, a Laplacian, a Gaussian blur), with
normal noise of a tenth of their standard deviation. One convolution of 3 x 3 without bias, from random weights, 500
steps of Adam on all pictures, at a rate that falls from 0.05 to nothing by a cosine. The pictures are handwritten
digits; for comparison, as many of normal noise, whose pixels know nothing of each other. The seeds change pictures,
noise and weights.

It holds if every kernel that was learnt from digits has a cosine of more than 0.999 with the one that it should be.
"""

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, cosine_similarity, mse_loss

from upright.evidence.bench import Bench
from upright.evidence.finding import Finding, draw_band, panels, rows, spreads

KERNELS = {
    "Sobel": ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0)),
    "Laplacian": ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0)),
    "Gaussian": ((1 / 16, 1 / 8, 1 / 16), (1 / 8, 1 / 4, 1 / 8), (1 / 16, 1 / 8, 1 / 16)),
}
REACHED = 0.999


def learn(images: Tensor, kernel: Tensor, seed: int, steps: int) -> tuple[Tensor, list[float]]:
    """Return the learnt kernel ``(3, 3)``, and after each step its cosine with the true one."""
    torch.manual_seed(seed)
    answers = conv2d(images, kernel[None, None])
    answers += 0.1 * answers.std() * torch.randn_like(answers)
    learner = nn.Conv2d(1, 1, 3, bias=False)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    cosines = []
    for _ in range(steps):
        optimizer.zero_grad()
        mse_loss(learner(images), answers).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        cosines.append(float(cosine_similarity(learner.weight.detach().flatten(), kernel.flatten(), dim=0)))
    return learner.weight.detach()[0, 0], cosines


def summary(steps: Sequence[int | None]) -> str:
    """Return the number of runs that reached the cosine, and their mean number of steps, as text."""
    step_counts = [step for step in steps if step is not None]
    when = f", after {statistics.mean(step_counts):.0f} steps on average" if step_counts else ""
    return f"by {len(step_counts)} of {len(steps)} runs{when}"


def run(bench: Bench) -> Finding:
    """Learn each kernel from digits and from noise."""
    digits = bench.data()().samples("train")
    steps = bench.choose(50, 500)
    runs: dict[str, dict[str, list[tuple[Tensor, list[float]]]]] = {
        source: {name: [] for name in KERNELS} for source in ("digits", "noise")
    }
    for seed in range(bench.seeds):
        torch.manual_seed(seed)
        sample = digits[torch.randperm(len(digits))[: bench.choose(32, 256)]].images.float() / 255
        images = {"digits": (sample - sample.mean()) / sample.std(), "noise": torch.randn(sample.shape)}
        for name, kernel in KERNELS.items():
            for source in runs:
                runs[source][name].append(learn(images[source], torch.tensor(kernel), seed, steps))
    paths = {source: [cosines for each in kernels.values() for _, cosines in each] for source, kernels in runs.items()}
    ends = {
        source: {name: [run[-1] for _, run in kernels[name]] for name in KERNELS} for source, kernels in runs.items()
    }
    needed = {
        source: [next((step for step, cosine in enumerate(path, 1) if cosine > REACHED), None) for path in each]
        for source, each in paths.items()
    }
    least = min(path[-1] for path in paths["digits"])
    sentence = (
        f"The least cosine of a kernel that was learnt from digits with the one that made the answers is {least:.5f}; "
        f"a cosine of {REACHED} was reached {summary(needed['digits'])}, and {summary(needed['noise'])} where the "
        "pixels of a picture are independent."
    )
    columns = {f"from {source}, cosine": spreads(each, 5) for source, each in ends.items()}
    learnt = {name: runs["digits"][name][0][0] for name in KERNELS}
    columns["learnt from digits"] = {
        name: " / ".join(" ".join(f"{value:+.2f}" for value in row) for row in kernel.tolist())
        for name, kernel in learnt.items()
    }
    figure, axes = panels(4, width=2.6, height=2.8)
    for axis, name in zip(axes, KERNELS, strict=False):
        pair = torch.cat([torch.tensor(KERNELS[name]), torch.full((3, 1), torch.nan), learnt[name]], 1)
        largest = float(pair.nan_to_num().abs().max())
        axis.imshow(pair.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest)
        axis.set_title(f"{name}: given, learnt")
        axis.set_axis_off()
    for source, style in (("digits", "-"), ("noise", "--")):
        draw_band(axes[3], range(1, steps + 1), 1 - torch.tensor(paths[source]).numpy(), source, linestyle=style)
    axes[3].set(yscale="log", xlabel="step", ylabel="1 - cosine")
    axes[3].legend()
    table = rows("kernel", {name: name for name in KERNELS}, columns)
    return Finding(least > REACHED, sentence, table, figure, {"cosine": ends, f"steps to {REACHED}": needed})
