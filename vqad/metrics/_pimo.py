"""AUPIMO: the share of each defect that is found at very low false-positive rates on normal images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqad._warn import warn
from vqad.metrics._pixel_counts import each, read_pairs

# Number of normal pixels held before those below the threshold of the limit are dropped.
HELD_PIXELS = 2**20


def aupimo(
    masks: Iterable[Any], maps: Iterable[Any], *, fpr_limits: tuple[float, float] = (1e-5, 1e-4)
) -> NDArray[np.float64]:
    r"""Area under the per-image overlap curve (AUPIMO) of every defective image [1]_.

    False-positive rates are measured on normal images only. At a threshold :math:`t`, with :math:`s` the score of a
    pixel, the false-positive rate is the mean over the normal images :math:`N_1, \dots, N_n` of the share of their
    pixels that are called defects. The true-positive rate of a defective image :math:`i` is the share of its defect
    pixels :math:`D_i` that is found:

    .. math::
        \mathrm{FPR}(t) = \frac1n \sum_j \frac{|\{p \in N_j : s_p \ge t\}|}{|N_j|}, \qquad
        \mathrm{TPR}_i(t) = \frac{|\{p \in D_i : s_p \ge t\}|}{|D_i|}.

    Between the limits :math:`L` and :math:`U` of the false-positive rate, on a logarithmic scale,

    .. math::
        \mathrm{AUPIMO}_i = \frac{1}{\log(U/L)} \int_{\log L}^{\log U} \mathrm{TPR}_i \; d\log\mathrm{FPR}.

    With the default limits it measures what is found when at most one pixel in 10,000 is a false alarm. The normal
    pixels of defective images, whose labels are less reliable, are not used.

    Parameters
    ----------
    masks : array of shape (n_images, H, W), or iterable of n_images arrays of shape (H_i, W_i)
        bool, True on defect pixels; integers 0/1 or 0/255 are accepted too. An image without defect pixels is normal.
        Images whose mask is None are left out.
    maps : array of shape (n_images, H, W), or iterable of n_images arrays of shape (H_i, W_i)
        Finite; higher is more anomalous.
    fpr_limits : (float, float), default=(1e-5, 1e-4)
        L and U, 0 < L < U <= 1.

    Returns
    -------
    ndarray of shape (n_images,), float64
        In [0, 1]; nan for normal images and those that were left out. ``numpy.nanmean`` gives one number for all.

    Raises
    ------
    ValueError
        When maps or masks have the wrong shape, dtype, length or values, there is no normal or no defective image, or
        limits are out of range.

    Warns
    -----
    UserWarning
        When the normal images have fewer than 1/L pixels. The lowest rates then cannot be measured, and the share found
        above all normal pixels is used for them.

    Notes
    -----
    The integral is exact, in the sense of `aupro`: the curve is flat where only the false-positive rate grows, and a
    straight line where normal and defect pixels have the same score.

    Collections with a length are read once, an image at a time. The scores of the defect pixels, of about a share U of
    all others, and a buffer of a million are held in memory. For iterators all normal pixels are held. Time is linear
    in the number of pixels, except for sorting those that are held.

    References
    ----------
    .. [1] Bertoldo, Ameln, Vaidya & Akçay, "AUPIMO: Redefining Visual Anomaly Detection Benchmarks with High Speed and
       Low Tolerance", BMVC 2024. arXiv:2401.01984.
    """
    limits = np.asarray(fpr_limits, dtype=float)
    if limits.shape != (2,) or not 0 < limits[0] < limits[1] <= 1:
        raise ValueError(f"fpr_limits must be two numbers with 0 < lower < upper <= 1, got {fpr_limits!r}")
    low, high = limits.tolist()
    n_images = min((len(x) for x in (masks, maps) if isinstance(x, Sized)), default=None)
    normal = _HighestPixels(np.inf if n_images is None else high * n_images)
    defects: list[NDArray[Any] | None] = []

    def counted() -> Iterator[Any]:
        for scores in each(maps):
            defects.append(None)
            yield scores

    for i, mask, scores in read_pairs(masks, counted()):
        if mask is not None:
            defects[i] = scores[mask]
        elif scores.size:
            normal.add(scores)
    if not normal.n_images:
        raise ValueError("every mask marks a defect: aupimo needs normal images to measure false-positive rates")
    if all(own is None for own in defects):
        raise ValueError("the masks mark no defect pixel (True): aupimo needs at least one")
    if normal.n_pixels * low < 1:
        warn(
            f"The normal images have {normal.n_pixels} pixels, too few for a false-positive rate of {low:g}: "
            f"{np.ceil(1 / low):.0f} are needed. Give more of them, or higher fpr_limits."
        )
    score, rate = normal.rates()
    return np.array([np.nan if own is None else _share_found(own, score, rate, low, high) for own in defects])


class _HighestPixels:
    """The highest pixels of normal images, up to a false-positive rate of ``limit`` / number of images."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._floor = -np.inf
        self._scores: list[NDArray[Any]] = []
        self._weights: list[NDArray[np.float64]] = []
        self._held = 0
        self._largest = HELD_PIXELS
        self.n_images = 0
        self.n_pixels = 0

    def add(self, scores: NDArray[Any]) -> None:
        """Add the scores of a normal image, each with the weight 1 / (number of its pixels)."""
        self.n_images += 1
        self.n_pixels += scores.size
        # Scores below the floor are beyond the limit, whatever images follow.
        high = scores[scores >= self._floor]
        self._scores.append(high)
        self._weights.append(np.full(high.size, 1 / scores.size))
        self._held += high.size
        if self._held > self._largest and np.isfinite(self._limit):
            self._prune()
            self._largest = max(HELD_PIXELS, 2 * self._held)

    def rates(self) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """Distinct scores in descending order, and the false-positive rate at each."""
        self._prune()
        score, weight = self._scores[0], self._weights[0]
        last = np.flatnonzero(np.append(score[1:] != score[:-1], True))
        return score[last], np.minimum(np.cumsum(weight)[last] / self.n_images, 1.0)

    def _prune(self) -> None:
        score, weight = np.concatenate(self._scores), np.concatenate(self._weights)
        order = np.argsort(-score, kind="stable")
        score, weight = score[order], weight[order]
        reached = int(np.searchsorted(np.cumsum(weight), self._limit))
        keep = score.size
        if reached < keep:
            # Keep all pixels with the score at which the limit is reached; lower ones are not needed.
            self._floor = score[reached]
            keep = int(np.searchsorted(-score, -self._floor, side="right"))
        self._scores, self._weights, self._held = [score[:keep]], [weight[:keep]], keep


def _share_found(
    defect: NDArray[Any], score: NDArray[Any], rate: NDArray[np.float64], low: float, high: float
) -> float:
    """Mean share of the pixels ``defect`` that is found, over the logarithm of the rate between its limits.

    A pixel is found from the rate given by the normal pixels above it. If normal pixels have the same score, its share
    grows linearly while the rate grows by these.
    """
    falling = -score
    above = np.append(0.0, rate)[np.searchsorted(falling, -defect, side="left")]
    at = np.append(0.0, rate)[np.searchsorted(falling, -defect, side="right")]
    start, stop = np.clip(above, low, high), np.clip(at, low, high)
    area = np.log(high / stop)
    tied = at > above
    b, s, e = above[tied], start[tied], stop[tied]
    area[tied] += (e - s - b * np.log(e / s)) / (at[tied] - b)
    return float(np.clip(area.mean() / np.log(high / low), 0.0, 1.0))
