"""Thresholds from labelled images: for the best F1, a minimum recall, or the lowest cost."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real

import numpy as np
from sklearn.utils._param_validation import Interval, StrOptions, validate_parameter_constraints

from vqad._warn import warn
from vqad.calibration import conformal_quantile

_RULE_CONSTRAINTS = {
    "target": [StrOptions({"f1", "recall", "cost"})],
    "recall": [Interval(Real, 0, 1, closed="right")],
    "miss_cost": [Interval(Real, 0, None, closed="neither")],
    "false_alarm_cost": [Interval(Real, 0, None, closed="neither")],
}


Rule = Callable[[np.ndarray, np.ndarray], float]
"""Computes a threshold from scores, where higher is more normal, and labels."""


def threshold_rule(target: str, recall: float, miss_cost: float, false_alarm_cost: float) -> Rule:
    """The rule that computes the threshold for ``target`` from (score, y).

    Raises
    ------
    InvalidParameterError
        A ValueError, when an argument is out of range.
    """
    given = {"target": target, "recall": recall, "miss_cost": miss_cost, "false_alarm_cost": false_alarm_cost}
    validate_parameter_constraints(_RULE_CONSTRAINTS, given, caller_name="set_threshold")
    rules: dict[str, Rule] = {
        "f1": f1_threshold,
        "recall": lambda score, y: recall_threshold(score, y, recall),
        "cost": lambda score, y: cost_threshold(score, y, miss_cost, false_alarm_cost),
    }
    return rules[target]


def quantile_rule(rate: float) -> Rule:
    """Rule for normal images alone: the conformal quantile of their scores at this false-alarm rate."""
    return lambda score, y: -conformal_quantile(np.sort(-score), rate)


def f1_threshold(score: np.ndarray, y: np.ndarray) -> float:
    """Threshold of the largest F1, with anomalies as the positive class.

    Parameters
    ----------
    score : ndarray of shape (n,)
        Finite; higher is more normal.
    y : ndarray of shape (n,) of +1 / -1
        With at least one of each.

    Returns
    -------
    threshold : float
        Scores below it are called anomalous. It lies midway between two scores. Of equally good thresholds it is the
        lowest, which raises the fewest false alarms.
    """
    threshold, found, false_alarms = _cuts(score, y)
    # Quotients of integers, so that equal values are equal to the last bit.
    return float(threshold[np.argmax(2 * found / (found + false_alarms + found[-1]))])


def recall_threshold(score: np.ndarray, y: np.ndarray, recall: float) -> float:
    """The lowest threshold with at least this ``recall`` of the anomalies; otherwise like `f1_threshold`."""
    threshold, found, _ = _cuts(score, y)
    return float(threshold[np.argmax(found >= recall * found[-1] * (1 - 1e-12))])


def cost_threshold(score: np.ndarray, y: np.ndarray, miss_cost: float, false_alarm_cost: float) -> float:
    """Threshold of the lowest total cost of missed anomalies and false alarms; otherwise like `f1_threshold`."""
    threshold, found, false_alarms = _cuts(score, y)
    cost = miss_cost * (found[-1] - found) + false_alarm_cost * false_alarms
    # Equal costs may differ by rounding, which must not decide between thresholds.
    return float(threshold[np.argmax(cost <= cost.min() * (1 + 1e-12))])


def _cuts(score: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All distinct thresholds, ascending, with the numbers of anomalies and of normal images below each.

    Nothing is below the first one, everything below the last.
    """
    value, place = np.unique(score, return_inverse=True)
    found, false_alarms = (
        np.append(0, np.cumsum(np.bincount(place[y == label], minlength=len(value)))) for label in (-1, 1)
    )
    above = np.nextafter(value, np.inf)
    midway = np.maximum(value[:-1] / 2 + value[1:] / 2, above[:-1])  # the mean of adjacent floats may be the lower one
    return np.concatenate([value[:1], midway, above[-1:]]), found, false_alarms


def labelled_offset(
    offset: float | np.ndarray,
    per_category: bool,
    categories: np.ndarray,
    score: np.ndarray,
    category: np.ndarray,
    y: np.ndarray,
    rule: Rule,
) -> float | np.ndarray:
    """Offset according to ``rule``: a number, or one per category.

    Parameters
    ----------
    offset : float or ndarray of shape (n_categories,)
        Previous offset.
    per_category : bool
    categories : ndarray of shape (n_categories,)
        Labels of the categories.
    score : ndarray of shape (n,)
        Higher is more normal.
    category : ndarray of shape (n,) of int
        Category that each image is judged as.
    y : ndarray of shape (n,) of +1 / -1
    rule : Rule

    Raises
    ------
    ValueError
        With ``per_category``, when no category has images of both labels.

    Warns
    -----
    UserWarning
        When categories without both labels keep their offset.
    """
    if not per_category:
        return rule(score, y)
    offsets: np.ndarray = np.array(np.broadcast_to(offset, len(categories)))
    lacking = []
    for c in range(len(categories)):
        own = category == c
        if len(np.unique(y[own])) == len(np.unique(y)):
            offsets[c] = rule(score[own], y[own])
        else:
            lacking.append(str(categories[c]))
    if len(lacking) == len(categories):
        raise ValueError(
            "threshold='category' needs normal images and anomalies that are judged as the same category, but no "
            "category has both. Give more images, or set threshold='global'."
        )
    if lacking:
        warn(f"Categories without both normal images and anomalies keep their threshold: {', '.join(lacking)}.")
    return offsets
