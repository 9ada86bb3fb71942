"""Harm and gain of a transformer that straightens images in front of a classifier.

The transformer abstains below a threshold of its confidence: the image then passes unchanged. So the answers with and
without straightening give the harm and the gain for every threshold, from one measurement.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from upright.errors import GateError
from upright.intervals import Share, clustered
from upright.tables import markdown

Flags = npt.NDArray[np.bool_]

MARGIN = 1e-5
"""Distance of a chosen threshold from the confidences around it. Rounding changes a confidence by less."""


@dataclass(frozen=True, eq=False)
class Answers:
    """Answers of a classifier for images, alone and behind a transformer that straightens all of them.

    Args:
        bare_right: True for each image that the classifier alone answers correctly, ``(N,)``.
        straightened_right: the same, for the straightened images.
        confidence: confidence of the transformer, from 0 to 1, ``(N,)``; -1 for images that it never rotates.
        upright: True for upright images, False for rotated ones, ``(N,)``. There is at least one of each.
        groups: index of the source image of each image, ``(N,)``. The views of a source are not independent.
    """

    bare_right: Flags
    straightened_right: Flags
    confidence: npt.NDArray[np.float32]
    upright: Flags
    groups: npt.NDArray[np.int64]

    def effect(self, threshold: float) -> dict[str, Any]:
        """Return the effect of the transformer with this threshold, as in ``parity.json``.

        ``harm`` is the share of the upright images whose answer goes from right to wrong, ``touched`` the share of
        those that are straightened nevertheless, and ``gain`` the share of the rotated images whose answer goes from
        wrong to right. Shares are in points, from 0 to 100.
        """
        acts = self.confidence >= np.float32(threshold)
        right = np.where(acts, self.straightened_right, self.bare_right)
        kinds = {"upright": self.upright, "rotated": ~self.upright}
        shares = {
            "harm": self._harm(acts),
            "gain": self._share(~self.bare_right & right, ~self.upright),
            "touched": self._share(acts, self.upright),
        }
        effect: dict[str, Any] = {"threshold": float(np.float32(threshold))}
        for name, share in shares.items():
            effect[name], *effect[f"{name}_interval"] = (100 * number for number in share)
        effect["accuracy"] = {
            kind: {"bare": float(self.bare_right[chosen].mean()), "attached": float(right[chosen].mean())}
            for kind, chosen in kinds.items()
        }
        return effect | {"images": {kind: int(chosen.sum()) for kind, chosen in kinds.items()}}

    def smallest_threshold(self, max_harm: float) -> float:
        """Return the smallest threshold for which the upper end of the interval of the harm is within a limit.

        The limit is in points, from 0 to 100. The harm never rises with the threshold. The search begins at the largest
        threshold and stops before the first one that breaks the limit, so the choice does not bias the bound (Bates et
        al. 2021, "Distribution-free, risk-controlling prediction sets").

        Raises:
            GateError: if no threshold is within the limit, or only one at which no image is straightened.
        """
        values = np.unique(self.confidence)
        if (least := self._harm(np.zeros_like(self.upright)).high) * 100 > max_harm:
            raise GateError(
                f"{int(self.upright.sum())} upright images cannot show a harm within --max-harm {max_harm:g} points: "
                f"even without any harm, the interval ends at {100 * least:.2f}. Give more images, or allow more harm."
            )
        harmed = self.upright & self.bare_right & ~self.straightened_right
        for limit in np.unique(self.confidence[harmed])[::-1]:
            if (harm := self._harm(self.confidence >= limit)).high * 100 > max_harm:
                above = values[values > limit]
                if not len(above):
                    raise GateError(
                        f"No threshold has a harm within --max-harm {max_harm:g} points: the most confident images "
                        f"have {100 * harm.value:.2f} (95 %: up to {100 * harm.high:.2f}). Nothing was written."
                    )
                # Lie in the middle of the first wide gap, so that rounding on another machine changes no decision.
                edges = np.concatenate([[limit], above]).astype(float)
                gaps = np.diff(edges)
                first = np.argmax(gaps >= min(2 * MARGIN, gaps.max()))
                return float(edges[first] + gaps[first] / 2)
        return 0.0

    def _harm(self, acts: Flags) -> Share:
        return self._share(acts & self.bare_right & ~self.straightened_right, self.upright)

    def _share(self, flags: Flags, chosen: Flags) -> Share:
        return clustered(flags[chosen], self.groups[chosen])


def summary(effect: dict[str, Any]) -> str:
    """Return harm, gain and accuracy of an `Answers.effect`, which may come from ``parity.json``, in one line."""
    shares = [
        "{} {:.2f} points (95 %: {:.2f} to {:.2f})".format(title, effect[key], *effect[f"{key}_interval"])
        for title, key in (("Harm", "harm"), ("gain", "gain"))
    ]
    accuracy = [
        f"{kind} {values['bare']:.4f} as they are, {values['attached']:.4f} straightened"
        for kind, values in effect["accuracy"].items()
    ]
    return f"{', '.join(shares)}. Accuracy of images: {'; '.join(accuracy)}."


def effect_tables(effect: dict[str, Any]) -> str:
    """Return two tables for the README of a bundle, from `Answers.effect`."""
    shares = [["share", "images", "points", "95 %"]]
    for key, kind, meaning in (
        ("harm", "upright", "answers that go from right to wrong"),
        ("touched", "upright", "images that are rotated nevertheless"),
        ("gain", "rotated", "answers that go from wrong to right"),
    ):
        low, high = effect[f"{key}_interval"]
        count = f"{effect['images'][kind]} {kind}"
        shares.append([f"{key}: {meaning}", count, f"{effect[key]:.2f}", f"{low:.2f} to {high:.2f}"])
    accuracy = [["accuracy of images", "as they are", "straightened"]]
    accuracy += [[kind, f"{row['bare']:.4f}", f"{row['attached']:.4f}"] for kind, row in effect["accuracy"].items()]
    return f"{markdown(shares, 2)}\n{markdown(accuracy, 2)}"
