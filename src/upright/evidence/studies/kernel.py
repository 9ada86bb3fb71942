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
from upright.evidence.plots import draw_band, panels
from upright.evidence.study import Finding, mean_and_spread

KERNELS = {
    "Sobel": ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0)),
    "Laplacian": ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0)),
    "Gaussian": ((1 / 16, 1 / 8, 1 / 16), (1 / 8, 1 / 4, 1 / 8), (1 / 16, 1 / 8, 1 / 16)),
}


def learn(images: Tensor, kernel: Tensor, seed: int, steps: int) -> tuple[Tensor, list[float]]:
    """The kernel that was learnt, ``(3, 3)``, and after each step its cosine with the one that it should be."""
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


def _after(steps: Sequence[int | None]) -> str:
    """How many runs got there, and when."""
    reached = [step for step in steps if step is not None]
    when = f", after {statistics.mean(reached):.0f} steps on average" if reached else ""
    return f"by {len(reached)} of {len(steps)} runs{when}"


def run(bench: Bench) -> Finding:
    """Learn each kernel from digits and from noise."""
    digits = bench.data()().samples("train")
    steps = bench.choose(50, 500)
    found: dict[tuple[str, str], list[tuple[Tensor, list[float]]]] = {}
    for seed in range(bench.seeds):
        torch.manual_seed(seed)
        chosen = digits[torch.randperm(len(digits))[: bench.choose(32, 256)]].images.float() / 255
        pictures = {"digits": (chosen - chosen.mean()) / chosen.std(), "noise": torch.randn(chosen.shape)}
        for name, kernel in KERNELS.items():
            for source, images in pictures.items():
                found.setdefault((name, source), []).append(learn(images, torch.tensor(kernel), seed, steps))
    ends = {key: [cosines[-1] for _, cosines in runs] for key, runs in found.items()}
    from_digits = [value for (_, source), each in ends.items() if source == "digits" for value in each]
    needed = {
        source: [
            next((step for step, value in enumerate(cosines, 1) if value > 0.999), None)
            for name in KERNELS
            for _, cosines in found[name, source]
        ]
        for source in ("digits", "noise")
    }
    held = min(from_digits) > 0.999
    sentence = (
        f"The least cosine of a kernel that was learnt from digits with the one that made the answers is "
        f"{min(from_digits):.5f}; a cosine of 0.999 was reached {_after(needed['digits'])}, and "
        f"{_after(needed['noise'])} where the pixels of a picture are independent."
    )
    table = [
        {
            "kernel": name,
            "from digits, cosine": mean_and_spread(ends[name, "digits"], 5),
            "from noise, cosine": mean_and_spread(ends[name, "noise"], 5),
            "learnt from digits": " / ".join(
                " ".join(f"{value:+.2f}" for value in row) for row in found[name, "digits"][0][0].tolist()
            ),
        }
        for name in KERNELS
    ]
    figure, axes = panels(4, width=2.6, height=2.8)
    for axis, name in zip(axes, KERNELS, strict=False):
        pair = torch.cat([torch.tensor(KERNELS[name]), torch.full((3, 1), torch.nan), found[name, "digits"][0][0]], 1)
        largest = float(pair.nan_to_num().abs().max())
        axis.imshow(pair.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest)
        axis.set_title(f"{name}: given, learnt", fontsize=9)
        axis.set_axis_off()
    for source, style in (("digits", "-"), ("noise", "--")):
        runs = [[1 - value for value in cosines] for name in KERNELS for _, cosines in found[name, source]]
        draw_band(axes[3], range(1, steps + 1), runs, source, linestyle=style)
    axes[3].set_yscale("log")
    axes[3].set_xlabel("step", fontsize=9)
    axes[3].set_ylabel("1 - cosine", fontsize=9)
    axes[3].legend(fontsize=8)
    cosines = {f"{name}, {source}": ends[name, source] for name, source in ends}
    return Finding(held, sentence, table, figure, {"cosine": cosines, "steps to 0.999": needed})
