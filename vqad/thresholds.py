"""Scales and thresholds that fit and partial_fit set from held-out normal images; and thresholds from labelled ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from numbers import Real

import numpy as np
import torch
from sklearn.utils._param_validation import Interval, StrOptions, validate_parameter_constraints
from torch import Tensor

from vqad._checks import some_of_each
from vqad._warn import warn
from vqad.calibration import ConformalCalibration, conformal_quantile
from vqad.device import compute_with, one_core_each
from vqad.scoring import FAR_WEIGHT

# Images whose maps are put together at a time.
IMAGES_AT_A_TIME = 512
# Normal images of a category that its scorer learns from, of those trained on and of those held out.
MAX_REFERENCE_IMAGES = 200
# Parts that images are divided into, each of which is measured by what was learned of the others.
N_FOLDS = 10


def calibrate(detector, store, descriptor, index, train, held_out, device, groups=None, n_known=0) -> None:
    """Set all that scores and decisions rest on beside the model.

    The first ``n_known`` categories are calibrated already. Their scores keep their scale; held-out images of theirs
    join those of before.

    Parameters
    ----------
    index : ndarray of shape (n,)
        Category of each image of ``store``; -1 for those to be left out.
    train, held_out : ndarray of int
    groups : ndarray of shape (n,), optional
        Of what is one piece.
    """
    n_categories = len(detector.categories_)
    reference, others = _reference_rows(index, train, held_out, n_known, detector._split_seed)
    if not n_known:
        detector.scorer_ = None
        detector._held_out = {name: np.empty(0) for name in ("standard", "peak")}
        detector._held_out["category"] = np.empty(0, dtype=np.int64)
        detector._seen = {"score": np.empty(0), "category": np.empty(0, dtype=np.int64)}
    else:
        detector.scorer_.add_categories(n_categories - n_known)
    judged = [(np.empty(0, dtype=np.int64), np.empty(0), np.empty(0))]
    for c in range(n_known, n_categories):
        rows = reference[index[reference] == c]
        if not len(rows):
            continue
        fields = _fields_of(detector, store, rows, index, device)
        if detector.scorer_ is None:
            shapes = {name: _shape(field) for name, field in fields.items()}
            detector.scorer_ = detector._make_scorer(shapes, n_categories)
        is_held = np.isin(rows, held_out)
        fold = torch.from_numpy(_folds(rows, groups, detector._split_seed))
        with one_core_each():  # many small decompositions, for which threads wait for each other
            compute_with(1)
            score, peak = detector.scorer_.learn(c, fields, fold, torch.from_numpy(is_held))
        judged.append((np.full(is_held.sum(), c), score.numpy()[is_held], peak.double().numpy()[is_held]))
    for part in _parts(others):
        found = detector._store_terms(store, part, index[part], device, detector._judged)
        judged.append((index[part], found["score"].astype(np.float64), _peak(found["map"])))
    found = dict(zip(("category", "standard", "peak"), map(np.concatenate, zip(*judged))))
    detector._held_out = {name: np.append(kept, found[name]) for name, kept in detector._held_out.items()}
    if detector.contamination != "auto":
        if not len(detector._seen["score"]):  # of before it was asked for there are those held out
            before = slice(len(detector._held_out["standard"]) - len(found["standard"]))
            held = {name: kept[before] for name, kept in detector._held_out.items()}
            detector._seen = {"score": -held["standard"], "category": held["category"]}
        _score_all(detector, store, descriptor, np.flatnonzero(index >= 0), device)
    _set_thresholds(detector)


def _fields_of(detector, store, rows, index, device) -> dict[str, Tensor]:
    found = detector._store_terms(store, rows, index[rows], device, detector._fields)
    return {name: torch.from_numpy(field) for name, field in found.items()}


def _shape(field: Tensor) -> tuple[int, int, int]:
    """Length of the vectors of a field, 0 of numbers; rows and columns."""
    d, h, w = field.shape[1:] if field.ndim == 4 else (0, *field.shape[1:])
    return d, h, w


def _folds(rows: np.ndarray, groups: np.ndarray | None, seed: int) -> np.ndarray:
    """A fold for each image, the same for all of a group."""
    unit = np.arange(len(rows)) if groups is None else np.unique(groups[rows], return_inverse=True)[1]
    n_units = unit.max() + 1
    return (np.random.RandomState(seed % 2**32).permutation(n_units) % min(N_FOLDS, n_units))[unit]


def _reference_rows(index, train, held_out, n_known, seed) -> tuple[np.ndarray, np.ndarray]:
    """Images that new categories are learned from; and the other held-out ones, those of known categories too."""
    new = np.setdiff1d(train[index[train] >= n_known], held_out)  # where too few could be held out, all are both
    held = held_out[index[held_out] >= n_known]
    chosen = [some_of_each(rows, index[rows], MAX_REFERENCE_IMAGES, seed) for rows in (new, held)]
    return np.sort(np.concatenate(chosen)), np.setdiff1d(held_out, chosen[1])


def _parts(rows: np.ndarray) -> list[np.ndarray]:
    return np.split(rows, range(IMAGES_AT_A_TIME, len(rows), IMAGES_AT_A_TIME)) if len(rows) else []


def _peak(maps: np.ndarray) -> np.ndarray:
    return maps.reshape(len(maps), -1).max(1).astype(np.float64)


def _score_all(detector, store, descriptor, rows, device) -> None:
    """Score all images learned from, and keep that with the scores of earlier calls."""
    category, excess = detector._route(descriptor[rows])
    score = [np.empty(0)]
    for place in _parts(np.arange(len(rows))):
        judged = detector._store_terms(store, rows[place], category[place], device, detector._judged)
        score.append(-(judged["score"] + FAR_WEIGHT * excess[place]))
    found = {"score": np.concatenate(score), "category": category}
    detector._seen = {name: np.append(kept, found[name]) for name, kept in detector._seen.items()}


def _set_thresholds(detector) -> None:
    held, per_category = detector._held_out, detector.threshold == "category"
    n_categories, rate = len(detector.categories_), detector.false_alarm_rate
    detector.conformal_ = ConformalCalibration(per_category).fit(held["standard"], held["category"], n_categories)
    if detector.contamination == "auto":
        offset = -detector.conformal_.thresholds(rate, detector.categories_)
    else:
        score, category = detector._seen["score"], detector._seen["category"]
        groups = [category == c for c in range(n_categories)] if per_category else []
        own = [score[group] if group.any() else score for group in groups or [category >= 0]]
        offset = np.array([np.quantile(s, detector.contamination) for s in own])
    detector.offset_ = offset if per_category else float(offset[0])
    detector._offset_from = None
    with warnings.catch_warnings():
        if detector.contamination == "auto":
            warnings.simplefilter("ignore", UserWarning)  # said of offset_ already
        detector.map_threshold_ = conformal_quantile(np.sort(held["peak"]), rate)


# ---- from labelled images ------------------------------------------------------------------------

_RULE_CONSTRAINTS = {
    "target": [StrOptions({"f1", "recall", "cost"})],
    "recall": [Interval(Real, 0, 1, closed="right")],
    "miss_cost": [Interval(Real, 0, None, closed="neither")],
    "false_alarm_cost": [Interval(Real, 0, None, closed="neither")],
}


def threshold_rule(target: str, recall: float, miss_cost: float, false_alarm_cost: float) -> Callable:
    """The function of (score, y) that gives the threshold for ``target``.

    Raises
    ------
    InvalidParameterError
        A ValueError, when an argument is out of its range.
    """
    given = {"target": target, "recall": recall, "miss_cost": miss_cost, "false_alarm_cost": false_alarm_cost}
    validate_parameter_constraints(_RULE_CONSTRAINTS, given, caller_name="set_threshold")
    return {
        "f1": f1_threshold,
        "recall": lambda score, y: recall_threshold(score, y, recall),
        "cost": lambda score, y: cost_threshold(score, y, miss_cost, false_alarm_cost),
    }[target]


def f1_threshold(score: np.ndarray, y: np.ndarray) -> float:
    """Threshold of the largest F1, anomalies being the positive class.

    Parameters
    ----------
    score : ndarray of shape (n,)
        Finite; higher is more normal.
    y : ndarray of shape (n,) of +1 / -1
        With at least one of each.

    Returns
    -------
    threshold : float
        Scores under it are called anomalous. Midway between two scores; of several that serve equally well it is the
        lowest, which raises the fewest false alarms.
    """
    threshold, found, false_alarms = _cuts(score, y)
    # The quotients are of whole numbers, so that equal ones are equal to the last bit.
    return float(threshold[np.argmax(2 * found / (found + false_alarms + found[-1]))])


def recall_threshold(score: np.ndarray, y: np.ndarray, recall: float) -> float:
    """The lowest threshold that finds at least the share ``recall`` of the anomalies; otherwise as `f1_threshold`."""
    threshold, found, _ = _cuts(score, y)
    return float(threshold[np.argmax(found >= recall * found[-1] * (1 - 1e-12))])


def cost_threshold(score: np.ndarray, y: np.ndarray, miss_cost: float, false_alarm_cost: float) -> float:
    """Threshold of the smallest total cost of missed anomalies and false alarms; otherwise as `f1_threshold`."""
    threshold, found, false_alarms = _cuts(score, y)
    cost = miss_cost * (found[-1] - found) + false_alarm_cost * false_alarms
    # Rounding may part equal costs, and must not decide between thresholds.
    return float(threshold[np.argmax(cost <= cost.min() * (1 + 1e-12))])


def _cuts(score: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All thresholds that differ in what is under them, rising, with the numbers of anomalies and normal images there.

    Under the first is nothing, under the last everything.
    """
    value, place = np.unique(score, return_inverse=True)
    found, false_alarms = (
        np.append(0, np.cumsum(np.bincount(place[y == label], minlength=len(value)))) for label in (-1, 1)
    )
    above = np.nextafter(value, np.inf)
    midway = np.maximum(value[:-1] / 2 + value[1:] / 2, above[:-1])  # of adjacent floats the mean may be the lower one
    return np.concatenate([value[:1], midway, above[-1:]]), found, false_alarms


def labelled_offset(detector, score, category, y, rule) -> float | np.ndarray:
    """``offset_`` by ``rule``: one number, or with ``threshold="category"`` one for each category that has both labels.

    Parameters
    ----------
    score : ndarray of shape (n,)
        Higher is more normal.
    category : ndarray of shape (n,) of int
        What the images are judged as.

    Raises
    ------
    ValueError
        When with ``threshold="category"`` no category has images of both labels.

    Warns
    -----
    UserWarning
        Of categories without both, which keep their offset.
    """
    if detector.threshold == "global":
        return rule(score, y)
    n_categories = len(detector.categories_)
    offset = np.array(np.broadcast_to(detector.offset_, n_categories))
    lacking = []
    for c in range(n_categories):
        own = category == c
        if len(np.unique(y[own])) == 2:
            offset[c] = rule(score[own], y[own])
        else:
            lacking.append(str(detector.categories_[c]))
    if len(lacking) == n_categories:
        raise ValueError(
            "threshold='category' needs normal images and anomalies that are judged as the same category; there is "
            "none with both. Give more images, or set threshold='global'."
        )
    if lacking:
        warn(f"No threshold is set for categories without both normal images and anomalies: {', '.join(lacking)}.")
    return offset
