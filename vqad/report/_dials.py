"""Data of the page's sliders: scores of its images and of held-out normal images, and one dial per category."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqad.base import BaseImageDetector
from vqad.verdicts import Verdicts

N_BINS = 60
# Scores beyond this many times the threshold share the last bin, so that an outlier does not squeeze all others.
LONGEST = 4.0
ALL = -1


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram, as shares of its height: the normal part is below the anomalous one."""

    normal: float
    anomalous: float


@dataclass(frozen=True)
class Dial:
    """One slider: its category (-1 for all), its threshold, and the texts shown without scripts."""

    category: int
    name: str
    n_images: int
    threshold: float
    position: float
    bars: tuple[Bar, ...]
    called: str
    good: str
    known: str


@dataclass(frozen=True)
class Scores:
    """Scores of the images of a page, and of the normal images that were held out.

    Attributes
    ----------
    names : list of str
        Names of the categories.
    score, category : ndarray of shape (n,)
        Score of each image, and its category as a position in `names`.
    y : ndarray of shape (n,) or None
    held_out_score, held_out_category : ndarray of shape (m,)
        The same for held-out normal images.
    threshold : ndarray of shape (n_categories,)
        Threshold of each category.
    """

    names: list[str]
    score: NDArray[Any]
    category: NDArray[Any]
    y: NDArray[Any] | None
    held_out_score: NDArray[Any]
    held_out_category: NDArray[Any]
    threshold: NDArray[Any]

    @classmethod
    def of(cls, detector: BaseImageDetector, verdicts: Verdicts, y: NDArray[Any] | None) -> Scores:
        """Collect the scores of a detector and its verdicts."""
        held_out = detector.fitted_.held_out
        position = {name: c for c, name in enumerate(detector.categories_.tolist())}
        return cls(
            names=[str(name) for name in detector.categories_],
            score=verdicts.score,
            category=np.array([position[name] for name in verdicts.category.tolist()], dtype=int),
            y=y,
            held_out_score=held_out.score,
            held_out_category=held_out.category,
            threshold=np.broadcast_to(-np.asarray(detector.offset_, dtype=float), len(detector.categories_)),
        )

    def edges(self) -> NDArray[np.float64]:
        """Edges of the bins, shared by all dials."""
        top = float(self.threshold.max())
        high = max(min(float(self.score.max()), top + LONGEST * max(abs(top), 1.0)), top)
        low = min(float(self.score.min()), float(self.threshold.min()))
        return np.linspace(low, high if high > low else low + 1.0, N_BINS + 1)

    def dials(self) -> list[Dial]:
        """The dial of all images and, if there are several categories, one for each that an image was judged as."""
        found = np.unique(self.category) if len(self.names) > 1 else []
        return [self._dial(int(c)) for c in [ALL, *found]]

    def to_json(self) -> str:
        """The scores as JSON for the page's script, safe inside a script element."""
        edges, every = self.edges(), range(len(self.names))
        content = {
            "names": self.names,
            "score": self.score.tolist(),
            "category": self.category.tolist(),
            "truth": None if self.y is None else [int(value) for value in self.y],
            "heldOut": [np.sort(self.held_out_score[self.held_out_category == c]).tolist() for c in every],
            "threshold": self.threshold.tolist(),
            "low": float(edges[0]),
            "high": float(edges[-1]),
        }
        return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")

    def _dial(self, c: int) -> Dial:
        mine = np.full(len(self.score), True) if c == ALL else self.category == c
        limit = float(np.median(self.threshold) if c == ALL else self.threshold[c])
        over = self.score > self.threshold[self.category]
        edges = self.edges()
        return Dial(
            category=c,
            name="All images" if c == ALL else self.names[c],
            n_images=int(mine.sum()),
            threshold=limit,
            position=(limit - edges[0]) / (edges[-1] - edges[0]),
            bars=self._bars(mine, edges),
            called=f"{(over & mine).sum()} of {mine.sum()} images called anomalous",
            good=self._good(c),
            known=self._known(mine, over),
        )

    def _bars(self, mine: NDArray[np.bool_], edges: NDArray[Any]) -> tuple[Bar, ...]:
        shown = np.clip(self.score, edges[0], edges[-1])
        bad = np.full(len(shown), False) if self.y is None else self.y == -1
        normal, anomalous = (np.histogram(shown[mine & kind], edges)[0] for kind in (~bad, bad))
        # Square roots keep a bin with one image visible beside one with a thousand.
        total = np.sqrt((normal + anomalous) / max(1, (normal + anomalous).max()))
        share = anomalous / np.maximum(normal + anomalous, 1)
        return tuple(Bar(float(t * (1 - s)), float(t * s)) for t, s in zip(total, share))

    def _good(self, c: int) -> str:
        """The share of good images that a threshold calls anomalous, judging by the held-out ones."""
        mine = np.full(len(self.held_out_score), True) if c == ALL else self.held_out_category == c
        over = self.held_out_score > self.threshold[self.held_out_category]
        n = int(mine.sum())
        rate = (1 + int((over & mine).sum())) / (n + 1)
        percent = math.ceil(1000 * rate - 1e-9) / 10
        one_in = f", 1 in {math.floor(1 / rate + 1e-9)}" if rate <= 0.5 else ""
        return f"good images: at most {percent:.1f} % called anomalous{one_in} (by {n} held out)"

    def _known(self, mine: NDArray[np.bool_], over: NDArray[np.bool_]) -> str:
        if self.y is None:
            return ""
        good, bad = mine & (self.y == 1), mine & (self.y == -1)
        return (
            f"false alarms: {(good & over).sum()} of {good.sum()} labelled normal; "
            f"missed: {(bad & ~over).sum()} of {bad.sum()} labelled anomalous"
        )
