"""Comparing two detectors on the same images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from sklearn.utils import check_random_state

from vqad.metrics._image import check_image_scores


@dataclass(frozen=True)
class Comparison:
    """Result of `compare` for two detectors a and b.

    Attributes
    ----------
    auroc : (float, float)
        Image AUROC of a and b.
    auroc_difference : float
        AUROC of b minus that of a.
    auroc_interval : (float, float)
        Confidence interval of this difference.
    found : (float, float)
        Recall of a and b, each at its own threshold with the same false-alarm rate.
    found_difference, found_interval
        As for the AUROC.
    false_alarm_rate, confidence_level : float
        As given.
    n_normal, n_anomalous : int
        Number of normal images and anomalies.
    """

    auroc: tuple[float, float]
    auroc_difference: float
    auroc_interval: tuple[float, float]
    found: tuple[float, float]
    found_difference: float
    found_interval: tuple[float, float]
    false_alarm_rate: float
    confidence_level: float
    n_normal: int
    n_anomalous: int

    def __str__(self) -> str:
        at = f"found at {self.false_alarm_rate:.3g} alarms"
        width, level = max(len(at), len("image AUROC")), f"{100 * self.confidence_level:g} % interval"
        lines = [
            f"{self.n_normal} normal images, {self.n_anomalous} anomalies; the same for both models",
            f"{'':<{width}}  {'a':>6}  {'b':>6}  {'b - a':>7}  {level}",
        ]
        rows = (
            ("image AUROC", self.auroc, self.auroc_difference, self.auroc_interval),
            (at, self.found, self.found_difference, self.found_interval),
        )
        for name, (a, b), difference, (low, high) in rows:
            lines.append(
                f"{name:<{width}}  {a:6.3f}  {b:6.3f}  {difference:+7.3f}  {low:+.3f} to {high:+.3f}, "
                f"{_said(low, high)}"
            )
        return "\n".join(lines)


def compare(
    y_true: ArrayLike,
    score_a: ArrayLike,
    score_b: ArrayLike,
    *,
    category: ArrayLike | None = None,
    false_alarm_rate: float = 0.05,
    n_resamples: int = 2000,
    confidence_level: float = 0.95,
    random_state: int | np.random.RandomState | None = None,
) -> Comparison:
    """Compare two detectors by their scores of the same images, with confidence intervals of the differences.

    Images are resampled together with both scores (paired bootstrap, [1]_), stratified by label and by category if
    given, so images that are hard for both do not widen the intervals. The intervals cover the choice of test images
    from the same source, but not the variation between training runs.

    Parameters
    ----------
    y_true : array-like of shape (n_images,)
        +1 for a normal image, -1 for an anomaly; both must occur.
    score_a, score_b : array-like of shape (n_images,)
        Finite; higher is more anomalous: ``-detector.score_samples(X)``. The two scales may differ.
    category : array-like of shape (n_images,), default=None
        Category of each image.
    false_alarm_rate : float, default=0.05
        In [0, 1): share of the normal images that may be above the threshold of each detector.
    n_resamples : int, default=2000
        Number of bootstrap resamples, at least 1.
    confidence_level : float, default=0.95
        In (0, 1).
    random_state : int, RandomState instance or None, default=None
        Draws the resamples; an int makes the intervals reproducible.

    Returns
    -------
    Comparison
        It prints as a table.

    Raises
    ------
    ValueError
        As `image_auroc`, or when a number is out of its range.

    References
    ----------
    .. [1] Efron & Tibshirani, "An Introduction to the Bootstrap", 1993.

    Examples
    --------
    >>> import numpy as np
    >>> from vqad.metrics import compare
    >>> rng = np.random.default_rng(0)
    >>> y = np.repeat([1, -1], 100)
    >>> hard = rng.normal(size=200)
    >>> found = compare(y, hard + (y == -1), hard + 1.5 * (y == -1), random_state=0)
    >>> found.auroc_interval[0] > 0
    True
    """
    y, a = check_image_scores(y_true, score_a)
    _, b = check_image_scores(y_true, score_b)
    for name, value, is_right in (
        ("false_alarm_rate must lie in [0, 1)", false_alarm_rate, 0 <= false_alarm_rate < 1),
        ("confidence_level must lie in (0, 1)", confidence_level, 0 < confidence_level < 1),
        ("n_resamples must be at least 1", n_resamples, n_resamples >= 1),
    ):
        if not is_right:
            raise ValueError(f"{name}, got {value!r}")
    strata = _strata(y, category)
    both, rng = np.stack([a, b]), check_random_state(random_state)
    seen = _measured(y, both, false_alarm_rate)
    drawn = np.empty((n_resamples, 2))
    for k in range(n_resamples):
        rows = np.concatenate([rows[rng.randint(len(rows), size=len(rows))] for rows in strata])
        auroc, found = _measured(y[rows], both[:, rows], false_alarm_rate)
        drawn[k] = auroc[1] - auroc[0], found[1] - found[0]
    tail = (1 - confidence_level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    (auroc_a, auroc_b), (found_a, found_b) = seen
    return Comparison(
        (auroc_a, auroc_b), auroc_b - auroc_a, (float(low[0]), float(high[0])),
        (found_a, found_b), found_b - found_a, (float(low[1]), float(high[1])),
        false_alarm_rate, confidence_level, int((y == 1).sum()), int((y == -1).sum()),
    )  # fmt: skip


def _strata(y: NDArray[np.int64], category: ArrayLike | None) -> list[NDArray[np.intp]]:
    """Rows of each combination of label and category."""
    kind = np.zeros(len(y), int)
    if category is not None:
        given = np.asarray(category)
        if given.shape != y.shape:
            raise ValueError(f"category has shape {given.shape}, but there are {len(y)} images: give one label each.")
        kind = np.unique(given, return_inverse=True)[1]
    parts = [np.flatnonzero((y == label) & (kind == c)) for label in (1, -1) for c in np.unique(kind)]
    return [rows for rows in parts if len(rows)]


def _measured(
    y: NDArray[np.int64], scores: NDArray[np.float64], rate: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """AUROC of both detectors, and their recall."""
    is_normal = y == 1
    auroc = [_auroc(is_normal, score) for score in scores]
    found = [_found(score[is_normal], score[~is_normal], rate) for score in scores]
    return (auroc[0], auroc[1]), (found[0], found[1])


def _auroc(is_normal: NDArray[np.bool_], score: NDArray[np.float64]) -> float:
    """AUROC from the ranks of the anomalies; ties count half."""
    n_normal, n_anomalous = int(is_normal.sum()), int((~is_normal).sum())
    ranks = rankdata(score)[~is_normal].sum()
    return float((ranks - n_anomalous * (n_anomalous + 1) / 2) / (n_normal * n_anomalous))


def _found(normal: NDArray[np.float64], anomalous: NDArray[np.float64], rate: float) -> float:
    """Share of anomalies above the lowest threshold that at most a share ``rate`` of the normal images exceeds."""
    n_alarms = math.floor(rate * len(normal) + 1e-9)
    return float((anomalous > np.sort(normal)[len(normal) - 1 - n_alarms]).mean())


def _said(low: float, high: float) -> str:
    return "b is better" if low > 0 else "a is better" if high < 0 else "no significant difference"
