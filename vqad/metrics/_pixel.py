"""Metrics of one score per pixel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, overload

import numpy as np

from vqad.metrics._pixel_counts import PixelCounts, count_pixels


def pixel_auroc(masks: Iterable[Any], maps: Iterable[Any]) -> float:
    """Area under the ROC curve over all pixels of all images, with defect pixels as the positive class.

    Parameters
    ----------
    masks : array of shape (n_images, H, W), or iterable of n_images arrays of shape (H_i, W_i)
        bool, True on defect pixels; integers 0/1 or 0/255 are accepted too. Images whose mask is None are left out.
    maps : array of shape (n_images, H, W), or iterable of n_images arrays of shape (H_i, W_i)
        Finite; higher is more anomalous. float32 and float64 are compared as they are, float16 and integers after
        conversion to float32 and float64.

    Returns
    -------
    float
        In [0, 1]: probability that a random defect pixel scores above a random normal one, where ties count half.

    Raises
    ------
    ValueError
        When maps or masks have the wrong shape, dtype, length or values, or there is no defect or no normal pixel.

    Notes
    -----
    Masks and maps may be lazy collections, which are read twice, one image at a time. About 50 bytes per *defect* pixel
    and a chunk of 64 MB (float32) are held in memory. Iterators such as generators are read once; then the scores of
    the normal pixels are held as well, 4 bytes each (float32).
    """
    return auroc_of(_known(count_pixels(masks, maps)[0]))


def pixel_average_precision(masks: Iterable[Any], maps: Iterable[Any]) -> float:
    """Average precision over all pixels of all images, with defect pixels as the positive class.

    The sum over all thresholds of the precision times the step in recall, without interpolation, which would be too
    optimistic [1]_. Recall changes only at the scores of defect pixels, so only these thresholds are used.

    Parameters
    ----------
    masks, maps
        As for `pixel_auroc`, with its memory.

    Returns
    -------
    float
        In (0, 1]. Constant maps give the share of defect pixels.

    Raises
    ------
    ValueError
        As `pixel_auroc`.

    References
    ----------
    .. [1] Davis & Goadrich, "The relationship between Precision-Recall and ROC curves", ICML 2006.
    """
    return average_precision_of(_known(count_pixels(masks, maps)[0]))


@overload
def pixel_f1_max(masks: Iterable[Any], maps: Iterable[Any], *, return_threshold: Literal[False] = False) -> float: ...
@overload
def pixel_f1_max(
    masks: Iterable[Any], maps: Iterable[Any], *, return_threshold: Literal[True]
) -> tuple[float, float]: ...
def pixel_f1_max(
    masks: Iterable[Any], maps: Iterable[Any], *, return_threshold: bool = False
) -> float | tuple[float, float]:
    """Largest F1 over all thresholds and all pixels of all images, with defect pixels as the positive class.

    Between two scores of defect pixels a lower threshold only adds false alarms, so the best threshold is the score of
    a defect pixel.

    Parameters
    ----------
    masks, maps
        As for `pixel_auroc`, with its memory.
    return_threshold : bool, default=False
        Also return the threshold of the largest F1.

    Returns
    -------
    f1 : float
        In (0, 1].
    threshold : float
        Pixels with scores at or above it are called defects. Of thresholds with the same F1 it is the highest. Only if
        `return_threshold`.

    Raises
    ------
    ValueError
        As `pixel_auroc`.
    """
    f1, threshold = f1_max_of(_known(count_pixels(masks, maps)[0]))
    return (f1, threshold) if return_threshold else f1


def aupro(masks: Iterable[Any], maps: Iterable[Any], *, fpr_limit: float = 0.3) -> float:
    r"""Area under the curve of the per-region overlap (PRO) up to a false-positive rate [1]_.

    The regions :math:`R_1, \dots, R_m` are the 8-connected components of all masks, :math:`N` is the set of
    all normal pixels, those of defective images included. At a threshold :math:`t`, with :math:`s` the score
    of a pixel,

    .. math::
        \mathrm{PRO}(t) = \frac1m \sum_r \frac{|\{p \in R_r : s_p \ge t\}|}{|R_r|}, \qquad
        \mathrm{FPR}(t) = \frac{|\{p \in N : s_p \ge t\}|}{|N|},

    .. math::
        \mathrm{AUPRO} = \frac1L \int_0^L \mathrm{PRO} \; d\mathrm{FPR}, \qquad L = \mathtt{fpr\_limit}.

    Every region has the same weight, whatever its size: PRO is the true-positive rate of a ROC curve in which a pixel
    of region r has the weight :math:`1 / (m |R_r|)`.

    Parameters
    ----------
    masks, maps
        As for `pixel_auroc`, but with about 80 bytes per defect pixel.
    fpr_limit : float, default=0.3
        In (0, 1]: false-positive rate up to which to integrate.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    ValueError
        As `pixel_auroc`, or when `fpr_limit` is not in (0, 1].

    Notes
    -----
    The integral is exact. Let :math:`u_1 > u_2 > \dots > u_k` be the distinct scores of defect pixels, and lower the
    threshold from infinity. Between two of them PRO is constant and only FPR grows, so the curve is flat there. At
    :math:`u_j` both change: FPR from the share of normal pixels above :math:`u_j` to the share at or above it, PRO from
    :math:`P_{j-1}` to :math:`P_j`. This is a vertical step if no normal pixel has the score :math:`u_j`, otherwise a
    straight line. The corners

    .. math::
        (\mathrm{FPR}_{> u_j}, P_{j-1}), \; (\mathrm{FPR}_{\ge u_j}, P_j), \qquad j = 1, \dots, k, \; P_0 = 0,

    together with (0, 0) and (1, 1) define the whole curve. Its trapezoids are summed; the last one is cut off at the
    limit, where PRO is interpolated.

    References
    ----------
    .. [1] Bergmann, Batzner, Fauser, Sattlegger & Steger, "The MVTec Anomaly Detection Dataset: A
       Comprehensive Real-World Dataset for Unsupervised Anomaly Detection", IJCV 129, 1038-1059, 2021.
    """
    check_fpr_limit(fpr_limit)
    return aupro_of(_known(count_pixels(masks, maps, regions=True)[0]), fpr_limit)


def auroc_of(counts: PixelCounts) -> float:
    """AUROC as the rank statistic of the defect pixels."""
    # float64: the sum may pass 2**63 from 1e10 pixels on, and is exact as long as it is below 2**53.
    won = 2.0 * counts.normal_below + counts.normal_tied
    return float(won @ counts.defect.astype(float) / (2.0 * counts.defect.sum() * counts.n_normal))


def average_precision_of(counts: PixelCounts) -> float:
    """Mean over the defect pixels of the precision at their score."""
    hits, alarms = _hits_and_alarms(counts)
    return float((hits / alarms) @ counts.defect / counts.defect.sum())


def f1_max_of(counts: PixelCounts) -> tuple[float, float]:
    """Largest F1 and the highest threshold that reaches it."""
    hits, alarms = _hits_and_alarms(counts)
    f1 = 2.0 * hits / (alarms + counts.defect.sum())
    best = f1.size - 1 - int(np.argmax(f1[::-1]))
    return float(f1[best]), float(counts.score[best])


def aupro_of(counts: PixelCounts, fpr_limit: float) -> float:
    """Integrate the curve whose corners `aupro` derives."""
    if counts.overlap is None:
        raise TypeError("aupro_of needs counts with regions: count_pixels(..., regions=True)")
    overlap = np.cumsum(counts.overlap[::-1])
    overlap /= overlap[-1]
    below, tied = counts.normal_below[::-1], counts.normal_tied[::-1]
    k = overlap.size
    false_alarms, pro = np.zeros(2 * k + 2), np.zeros(2 * k + 2)
    false_alarms[1:-1:2] = counts.n_normal - below - tied
    false_alarms[2:-1:2] = counts.n_normal - below
    false_alarms[-1] = counts.n_normal
    pro[3:-1:2] = overlap[:-1]
    pro[2:-1:2] = overlap
    pro[-1] = 1.0
    limit = fpr_limit * counts.n_normal
    # The last corner at or before the limit; a vertical step at the limit has no area either way.
    last = int(np.searchsorted(false_alarms, limit, side="right")) - 1
    at_limit = np.interp(limit, false_alarms[last : last + 2], pro[last : last + 2])
    area = np.diff(false_alarms[: last + 1]) @ (pro[1 : last + 1] + pro[:last]) / 2
    area += (limit - false_alarms[last]) * (pro[last] + at_limit) / 2
    return float(area / limit)


def check_fpr_limit(fpr_limit: float) -> None:
    """Raise unless the limit lies in (0, 1]."""
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit must lie in (0, 1], got {fpr_limit!r}")


def _hits_and_alarms(counts: PixelCounts) -> tuple[Any, Any]:
    """Defect pixels, and all pixels, at or above each distinct score of a defect pixel."""
    hits = np.cumsum(counts.defect[::-1])[::-1]
    return hits, hits + (counts.n_normal - counts.normal_below)


def _known(counts: PixelCounts) -> PixelCounts:
    if not counts.score.size:
        raise ValueError("the masks mark no defect pixel (True): pixel metrics need at least one")
    if not counts.n_normal:
        raise ValueError("the masks mark every pixel as defect: pixel metrics need at least one normal pixel")
    return counts
