"""Conformal calibration: thresholds and p-values from the scores of held-out normal images. NumPy only."""

from __future__ import annotations

import math

import numpy as np

from vqad._warn import warn


class ConformalCalibration:
    r"""Split-conformal p-values and thresholds from the scores of held-out normal images.

    With n calibration scores, :math:`p(s) = (1 + \#\{s_i \ge s\}) / (n + 1)`. For an image that is exchangeable with
    them, :math:`P(p \le \alpha) \le \alpha` (Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World, 2005).

    Parameters
    ----------
    per_category : bool
        Whether every category has its own calibration scores, or all share one set.
    """

    def __init__(self, per_category: bool = False):
        self.per_category = per_category

    def fit(self, score: np.ndarray, category: np.ndarray, n_categories: int) -> ConformalCalibration:
        """Keep the anomaly scores of held-out normal images, sorted."""
        groups = range(n_categories) if self.per_category else [None]
        self.scores_ = [np.sort(score if c is None else score[category == c]) for c in groups]
        return self

    def p_values(self, score: np.ndarray, category: np.ndarray) -> np.ndarray:
        """Probability that a normal image scores this high or higher, (n,) in (0, 1]."""
        out = np.empty(len(score))
        group = category if self.per_category else np.zeros(len(score), dtype=int)
        for c in np.unique(group):
            rows, known = group == c, self.scores_[c]
            at_least = len(known) - np.searchsorted(known, score[rows], side="left")
            out[rows] = (1 + at_least) / (len(known) + 1)
        return out

    def thresholds(self, rate: float, names=None) -> np.ndarray:
        """Anomaly score above which an image is anomalous with a false-alarm rate of at most ``rate``.

        Returns
        -------
        threshold : ndarray of shape (n_groups,)

        Warns
        -----
        UserWarning
            When the images are too few for that rate: the largest calibration score is taken. When all score alike.
        """
        names = range(len(self.scores_)) if names is None else names
        return np.array(
            [
                conformal_quantile(scores, rate, "" if not self.per_category else f" of category {names[c]}")
                for c, scores in enumerate(self.scores_)
            ]
        )


def conformal_quantile(scores: np.ndarray, rate: float, of: str = "") -> float:
    """The ceil((n + 1)(1 - rate))-th smallest of n sorted scores."""
    n = len(scores)
    if n > 1 and scores[0] == scores[-1]:
        warn(
            f"All {n} held-out calibration images{of} score alike: they may be copies of one picture. Any image may "
            "then be called an anomaly, even that picture. Give images that differ as normal ones do."
        )
    rank = math.ceil((n + 1) * (1 - rate) - 1e-9)
    if rank > n:
        if n == 0:
            raise ValueError(f"No calibration images{of}: raise calibration_fraction or give more images.")
        warn(
            f"{n} held-out calibration images{of} are too few for false_alarm_rate={rate:g}; the smallest rate that "
            f"they support is {1 / (n + 1):.3g}, which is used. Give more images or raise calibration_fraction."
        )
        return float(scores[-1])
    return float(scores[max(rank, 1) - 1])
