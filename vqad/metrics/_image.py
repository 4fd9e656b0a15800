"""Metrics of one score per image; the curves are scikit-learn's."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from sklearn.utils import check_random_state


def image_auroc(y_true: ArrayLike, anomaly_score: ArrayLike) -> float:
    """Area under the ROC curve of the image scores, with anomalies as the positive class.

    Parameters
    ----------
    y_true : array-like of shape (n_images,)
        +1 for a normal image, -1 for an anomaly; both must occur.
    anomaly_score : array-like of shape (n_images,)
        Finite; higher is more anomalous: ``-detector.score_samples(X)``.

    Returns
    -------
    float
        In [0, 1]: probability that a random anomaly scores above a random normal image, where ties count half.

    Raises
    ------
    ValueError
        When labels are not +1 and -1 or only one of them occurs, or scores are not finite or differ in number.
    """
    y, score = check_image_scores(y_true, anomaly_score)
    return float(roc_auc_score(y == -1, score))


def image_average_precision(y_true: ArrayLike, anomaly_score: ArrayLike) -> float:
    """Average precision of the image scores, with anomalies as the positive class.

    The sum over all thresholds of the precision times the step in recall, without interpolation, which would be too
    optimistic [1]_.

    Parameters
    ----------
    y_true : array-like of shape (n_images,)
        +1 for a normal image, -1 for an anomaly; both must occur.
    anomaly_score : array-like of shape (n_images,)
        Finite; higher is more anomalous: ``-detector.score_samples(X)``.

    Returns
    -------
    float
        In (0, 1]. Constant scores give the share of anomalies.

    Raises
    ------
    ValueError
        As `image_auroc`.

    References
    ----------
    .. [1] Davis & Goadrich, "The relationship between Precision-Recall and ROC curves", ICML 2006.
    """
    y, score = check_image_scores(y_true, anomaly_score)
    return float(average_precision_score(y == -1, score))


@overload
def image_f1_max(y_true: ArrayLike, anomaly_score: ArrayLike, *, return_threshold: Literal[False] = False) -> float: ...
@overload
def image_f1_max(
    y_true: ArrayLike, anomaly_score: ArrayLike, *, return_threshold: Literal[True]
) -> tuple[float, float]: ...
def image_f1_max(
    y_true: ArrayLike, anomaly_score: ArrayLike, *, return_threshold: bool = False
) -> float | tuple[float, float]:
    """Largest F1 of the image scores over all thresholds, with anomalies as the positive class.

    The threshold is chosen on the labels that it is evaluated on, so this is an upper bound for a threshold chosen
    beforehand.

    Parameters
    ----------
    y_true : array-like of shape (n_images,)
        +1 for a normal image, -1 for an anomaly; both must occur.
    anomaly_score : array-like of shape (n_images,)
        Finite; higher is more anomalous: ``-detector.score_samples(X)``.
    return_threshold : bool, default=False
        Also return the threshold of the largest F1.

    Returns
    -------
    f1 : float
        In (0, 1].
    threshold : float
        Images with scores at or above it are called anomalies. Of thresholds with the same F1 it is the highest, which
        raises the fewest alarms. Only if `return_threshold`.

    Raises
    ------
    ValueError
        As `image_auroc`.
    """
    y, score = check_image_scores(y_true, anomaly_score)
    precision, recall, thresholds = precision_recall_curve(y == -1, score)
    # The last point of the curve (precision 1 at recall 0) has no threshold.
    precision, recall = precision[:-1], recall[:-1]
    with np.errstate(invalid="ignore"):
        f1 = np.nan_to_num(2 * precision * recall / (precision + recall))
    # Equal F1 may differ by an ulp of rounding, which must not decide between thresholds.
    best = np.flatnonzero(f1 >= f1.max() * (1 - 1e-12))[-1]
    value = float(f1[best])
    return (value, float(thresholds[best])) if return_threshold else value


def bootstrap_interval(
    metric: Callable[[NDArray[Any], NDArray[Any]], float],
    y_true: ArrayLike,
    anomaly_score: ArrayLike,
    *,
    n_resamples: int = 1000,
    confidence_level: float = 0.95,
    random_state: int | np.random.RandomState | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap interval of an image metric, resampling images within each label [1]_.

    Each resample has as many normal images and as many anomalies as the data, so the metric is always defined. The
    interval covers the choice of test images from the same source, but not the variation between training runs.

    Parameters
    ----------
    metric : callable
        ``metric(y_true, anomaly_score) -> float``, such as `image_auroc`.
    y_true : array-like of shape (n_images,)
        +1 for a normal image, -1 for an anomaly; both must occur.
    anomaly_score : array-like of shape (n_images,)
        Finite; higher is more anomalous.
    n_resamples : int, default=1000
        At least 1.
    confidence_level : float, default=0.95
        In (0, 1).
    random_state : int, RandomState instance or None, default=None
        Draws the resamples; an int makes the interval reproducible.

    Returns
    -------
    low, high : float
        The quantiles ``(1 - confidence_level) / 2`` and ``(1 + confidence_level) / 2`` of the resampled metric.

    Raises
    ------
    ValueError
        As `image_auroc`, or when `n_resamples` or `confidence_level` is out of range.

    References
    ----------
    .. [1] Efron & Tibshirani, "An Introduction to the Bootstrap", chapter 13, 1993.
    """
    y, score = check_image_scores(y_true, anomaly_score)
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples!r}")
    if not 0 < confidence_level < 1:
        raise ValueError(f"confidence_level must lie in (0, 1), got {confidence_level!r}")
    rng = check_random_state(random_state)
    normal, anomaly = np.flatnonzero(y == 1), np.flatnonzero(y == -1)
    values = np.empty(n_resamples)
    for i in range(n_resamples):
        drawn = np.concatenate(
            [
                normal[rng.randint(normal.size, size=normal.size)],
                anomaly[rng.randint(anomaly.size, size=anomaly.size)],
            ]
        )
        values[i] = metric(y[drawn], score[drawn])
    tail = (1 - confidence_level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def check_image_scores(
    y_true: ArrayLike, anomaly_score: ArrayLike, *, both_labels: bool = True
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Check labels and scores; returns them as 1-D arrays."""
    y, score = np.asarray(y_true), np.asarray(anomaly_score)
    for name, values in (("y_true", y), ("anomaly_score", score)):
        if values.ndim != 1:
            raise ValueError(f"{name} must have one value per image, shape (n_images,); got shape {values.shape}")
    if y.shape != score.shape:
        raise ValueError(f"y_true has {y.size} images but anomaly_score has {score.size}")
    if y.size == 0:
        raise ValueError("y_true is empty: there is no image to measure on")
    if y.dtype.kind == "O" and all(isinstance(label, Integral) for label in y):  # a column of a table
        y = y.astype(float)
    if y.dtype.kind not in "iuf":
        raise ValueError(f"y_true must hold the numbers +1 (normal) and -1 (anomaly), got dtype {y.dtype}")
    wrong = ~np.isin(y, (-1, 1))
    if wrong.any():
        found = ", ".join(repr(value) for value in np.unique(y[wrong]).tolist()[:5])
        raise ValueError(
            f"y_true must hold +1 (normal) and -1 (anomaly) only, but also holds {found}; "
            "for labels with 1 = anomaly pass numpy.where(labels == 1, -1, 1)"
        )
    if score.dtype.kind not in "fiub":
        raise ValueError(f"anomaly_score must hold real numbers, got dtype {score.dtype}")
    bad = np.flatnonzero(~np.isfinite(score))
    if bad.size:
        raise ValueError(
            f"anomaly_score must be finite, but is {score[bad[0]]} for image {bad[0]} ({bad.size} such images in all)"
        )
    if both_labels:
        for label, name in ((-1, "anomaly"), (1, "normal image")):
            if not (y == label).any():
                raise ValueError(f"y_true holds no {name} ({label:+d}): the metric needs both labels")
    return y, score
