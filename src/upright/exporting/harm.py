"""Harm and gain of a transformer that straightens images in front of a classifier.

The transformer abstains below a threshold of its confidence: the image then passes unchanged. So the answers with and
without straightening give the harm and the gain for every threshold, from one measurement.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from upright.errors import GateError
from upright.intervals import Share, clustered
from upright.tables import markdown

Flags = npt.NDArray[np.bool_]

MARGIN = 1e-5
"""Distance of a chosen threshold from the confidences around it. Rounding changes a confidence by less."""


class Effect(NamedTuple):
    """The effect of a transformer with one threshold.

    Args:
        threshold: smallest confidence for which it straightens an image.
        harm: share of the upright images whose answer goes from right to wrong.
        gain: share of the rotated images whose answer goes from wrong to right.
        touched: share of the upright images that it straightens nevertheless.
        accuracy: accuracy of the classifier alone and behind the transformer, by kind of images.
        images: number of images, by kind.
    """

    threshold: float
    harm: Share
    gain: Share
    touched: Share
    accuracy: dict[str, dict[str, float]]
    images: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for ``parity.json``. Shares are in points, from 0 to 100."""
        shares: dict[str, Any] = {}
        for name in ("harm", "gain", "touched"):
            value, *interval = (100 * number for number in getattr(self, name))
            shares |= {name: value, f"{name}_interval": interval}
        return {"threshold": self.threshold, **shares, "accuracy": self.accuracy, "images": self.images}

    def summary(self) -> str:
        """Return harm, gain and accuracy in one line."""
        shares = [
            f"{name} {100 * share.value:.2f} points (95 %: {100 * share.low:.2f} to {100 * share.high:.2f})"
            for name, share in (("Harm", self.harm), ("gain", self.gain))
        ]
        accuracy = [
            f"{kind} {values['bare']:.4f} alone, {values['attached']:.4f} attached"
            for kind, values in self.accuracy.items()
        ]
        return f"{', '.join(shares)}. Accuracy: {'; '.join(accuracy)}."


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

    def effect(self, threshold: float) -> Effect:
        """Return harm and gain of the transformer with this threshold."""
        acts = self.confidence >= np.float32(threshold)
        right = np.where(acts, self.straightened_right, self.bare_right)
        kinds = {"upright": self.upright, "rotated": ~self.upright}
        return Effect(
            float(np.float32(threshold)),
            self._harm(acts),
            self._share(~self.bare_right & right, ~self.upright),
            self._share(acts, self.upright),
            {
                kind: {"bare": float(self.bare_right[chosen].mean()), "attached": float(right[chosen].mean())}
                for kind, chosen in kinds.items()
            },
            {kind: int(chosen.sum()) for kind, chosen in kinds.items()},
        )

    def smallest_threshold(self, max_harm: float) -> float:
        """Return the smallest threshold for which the upper end of the interval of the harm is within a limit.

        The harm never rises with the threshold. The search begins at the largest threshold and stops before the first
        one that breaks the limit, so the choice does not bias the bound (Bates et al. 2021, "Distribution-free,
        risk-controlling prediction sets").

        Args:
            max_harm: largest harm in points, from 0 to 100.

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


def effect_tables(effect: dict[str, Any]) -> str:
    """Return two tables for the README of a bundle, from `Effect.to_dict`."""
    shares = [["share", "images", "points", "95 %"]]
    for key, kind, meaning in (
        ("harm", "upright", "answers that go from right to wrong"),
        ("touched", "upright", "images that are rotated nevertheless"),
        ("gain", "rotated", "answers that go from wrong to right"),
    ):
        low, high = effect[f"{key}_interval"]
        count = f"{effect['images'][kind]} {kind}"
        shares.append([f"{key}: {meaning}", count, f"{effect[key]:.2f}", f"{low:.2f} to {high:.2f}"])
    accuracy = [["accuracy", "classifier alone", "attached"]]
    accuracy += [[kind, f"{row['bare']:.4f}", f"{row['attached']:.4f}"] for kind, row in effect["accuracy"].items()]
    return f"{markdown(shares, 2)}\n{markdown(accuracy, 2)}"
