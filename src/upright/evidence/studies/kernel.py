"""A kernel need not be designed: gradient descent recovers it from images and an edge detector's responses to them.

Protocol: Compute the responses of a 3 x 3 kernel to 256 images: Sobel's edge detector, a Laplacian or a Gaussian blur.
Add normal noise with a tenth of the responses' standard deviation. Train one 3 x 3 convolution without bias, from
random weights, with 500 steps of Adam on all images. The learning rate falls from 0.05 to 0 along a cosine. The images
are handwritten digits. For comparison, use as many images of normal noise, whose pixels are independent. The seeds
change images, noise and weights.

The claim holds if every kernel learnt from digits has a cosine similarity of more than 0.999 to the true kernel.
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
SOURCES = ("digits", "noise")
REACHED = 0.999


def learn(images: Tensor, kernel: Tensor, seed: int, steps: int) -> tuple[Tensor, list[float]]:
    """Return the learnt kernel ``(3, 3)``, and after each step its cosine with the true one."""
    torch.manual_seed(seed)
    responses = conv2d(images, kernel[None, None])
    responses += 0.1 * responses.std() * torch.randn_like(responses)
    learner = nn.Conv2d(1, 1, 3, bias=False)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    cosines = []
    for _ in range(steps):
        optimizer.zero_grad()
        mse_loss(learner(images), responses).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        cosines.append(float(cosine_similarity(learner.weight.detach().flatten(), kernel.flatten(), dim=0)))
    return learner.weight.detach()[0, 0], cosines


def summary(steps: Sequence[int | None]) -> str:
    """Return the number of runs that reached the cosine, and their mean number of steps, as text."""
    step_counts = [step for step in steps if step is not None]
    when = f", after {statistics.mean(step_counts):.0f} steps on average" if step_counts else ""
    return f"{len(step_counts)} of {len(steps)} runs reached {REACHED}{when}"


def run(bench: Bench) -> Finding:
    digits = bench.data()().samples("train")
    steps = bench.choose(50, 500)
    runs: dict[tuple[str, str], list[tuple[Tensor, list[float]]]] = {
        (source, name): [] for source in SOURCES for name in KERNELS
    }
    for seed in range(bench.seeds):
        torch.manual_seed(seed)
        sample = digits[torch.randperm(len(digits))[: bench.choose(32, 256)]].images.float() / 255
        images = {"digits": (sample - sample.mean()) / sample.std(), "noise": torch.randn(sample.shape)}
        for name, kernel in KERNELS.items():
            for source in SOURCES:
                runs[source, name].append(learn(images[source], torch.tensor(kernel), seed, steps))
    paths = {source: [path for name in KERNELS for _, path in runs[source, name]] for source in SOURCES}
    ends = {key: [path[-1] for _, path in each] for key, each in runs.items()}
    needed = {
        source: [next((step for step, cosine in enumerate(path, 1) if cosine > REACHED), None) for path in each]
        for source, each in paths.items()
    }
    least = min(path[-1] for path in paths["digits"])
    sentence = (
        f"The lowest cosine similarity of a kernel learnt from digits to the true kernel is {least:.5f}. With digits, "
        f"{summary(needed['digits'])}. With noise, whose pixels are independent, {summary(needed['noise'])}."
    )
    columns = {
        f"from {source}, cosine": spreads({name: ends[source, name] for name in KERNELS}, 5) for source in SOURCES
    }
    examples = {name: runs["digits", name][0][0] for name in KERNELS}
    columns["learnt from digits"] = {
        name: " / ".join(" ".join(f"{value:+.2f}" for value in row) for row in kernel.tolist())
        for name, kernel in examples.items()
    }
    figure, axes = panels(4, width=2.6, height=2.8)
    for axis, name in zip(axes, KERNELS, strict=False):
        pair = torch.cat([torch.tensor(KERNELS[name]), torch.full((3, 1), torch.nan), examples[name]], 1)
        largest = float(pair.nan_to_num().abs().max())
        axis.imshow(pair.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest)
        axis.set_title(f"{name}: true, learnt")
        axis.set_axis_off()
    for source, style in zip(SOURCES, ("-", "--"), strict=True):
        draw_band(axes[3], range(1, steps + 1), 1 - torch.tensor(paths[source]).numpy(), source, linestyle=style)
    axes[3].set(yscale="log", xlabel="step", ylabel="1 - cosine")
    axes[3].legend()
    table = rows("kernel", [*KERNELS], columns)
    return Finding(least > REACHED, sentence, table, figure, {"cosine": ends, f"steps to {REACHED}": needed})
