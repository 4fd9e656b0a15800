"""Scales and thresholds that fit and partial_fit set from held-out normal images; and thresholds from labelled ones."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from numbers import Real

import numpy as np
import torch
from sklearn.utils._param_validation import Interval, StrOptions, validate_parameter_constraints

from vqad._checks import some_of_each
from vqad._warn import warn
from vqad.calibration import (
    IMAGES_AT_A_TIME,
    ConformalCalibration,
    MapCalibration,
    ScoreCalibration,
    conformal_quantile,
)
from vqad.nn.whiten import leaving_out, total_second_moments, whitenings

# Normal images of a category that say where its maps are high; and of those held out, that say how high.
MAX_REFERENCE_IMAGES = 200
# Features whose deviations are held at a time, in numbers (256 MiB).
DEVIATION_NUMBERS = 2**26


def calibrate(detector, store, descriptor, index, train, held_out, device, n_known=0) -> None:
    """Set all that scores and decisions rest on beside the model.

    The first ``n_known`` categories are calibrated already. Their maps keep their scale, so that the scores of their
    held-out images of today and of before compare; a category without new held-out images keeps everything.

    Parameters
    ----------
    index : ndarray of shape (n,)
        Category of each image of ``store``; -1 for those to be left out.
    train, held_out : ndarray of int
    """
    n_categories = len(detector.categories_)
    _learn_metric(detector, store, np.flatnonzero(index >= n_known), index, device)
    reference, others = _reference_rows(index, train, held_out, n_known, detector._split_seed)
    is_held = np.isin(reference, held_out)
    terms = _reference_terms(detector, store, reference, is_held, index, device)
    held_terms = {name: term[is_held] for name, term in terms.items()}
    category = index[reference[is_held]]
    if not n_known:
        detector.map_calibration_ = MapCalibration(detector._map_weights())
        detector._held_out = {name: np.empty(0) for name in ("score", "unseen", "peak", "standard")}
        detector._held_out["category"] = np.empty(0, dtype=np.int64)
        detector._seen = {"score": np.empty(0), "category": np.empty(0, dtype=np.int64)}
    learn = detector.map_calibration_.extend if n_known else detector.map_calibration_.fit
    learn(terms, index[reference], held_terms, category, n_categories)
    if not n_known:
        detector.score_calibration_ = ScoreCalibration()
    pool = detector.score_calibration_.pool
    score = pool(detector.map_calibration_.combine(held_terms, category))
    maps = detector.map_calibration_.leave_one_out(held_terms, category, n_known)
    judged = [(category, score, pool(maps), _peak(maps))]
    with leaving_out(detector.model_):
        for part in _parts(others):
            terms = detector._store_terms(store, part, index[part], device)
            maps = detector.map_calibration_.combine(terms, index[part])
            score = pool(maps)  # of that many images, whether this one is among them or not
            judged.append((index[part], score, score, _peak(maps)))
    for whitening in whitenings(detector.model_):
        whitening.forget()
    category, score, unseen, peak = (np.concatenate(column) for column in zip(*judged))
    found = {"category": category, "score": score, "unseen": unseen, "peak": peak, "standard": np.zeros(len(score))}
    held = detector._held_out = {name: np.append(kept, found[name]) for name, kept in detector._held_out.items()}
    fresh, changed = np.unique(category), np.isin(held["category"], category)
    if not n_known:
        detector.score_calibration_.fit(score, category, n_categories)
    else:
        detector.score_calibration_.extend(held["score"], held["category"], fresh, n_categories)
    standard = detector.score_calibration_.leave_one_out(held["score"], held["unseen"], held["category"], fresh)
    held["standard"][changed] = standard[changed]
    if detector.contamination != "auto":
        if not len(detector._seen["score"]):  # of before it was asked for there are those held out
            before = slice(len(held["score"]) - len(score))
            detector._seen = {"score": -held["standard"][before], "category": held["category"][before]}
        _score_all(detector, store, descriptor, np.flatnonzero(index >= 0), device)
    _set_thresholds(detector)


def _learn_metric(detector, store, rows, index, device) -> None:
    """Tell the model's whitenings how normal images deviate, of those learned from and of others."""
    learning = dict(enumerate(whitenings(detector.model_)))

    def compute(model, features, category):
        return dict(zip(learning, detector._deviations(model, features, category), strict=True))

    n_at_once = max(1, DEVIATION_NUMBERS // sum(math.prod(m.shape[1:]) for m in store.maps))
    for c in np.unique(index[rows]) if learning else ():
        own = rows[index[rows] == c]
        total = {k: torch.zeros(each.dim, each.dim, dtype=torch.float64) for k, each in learning.items()}
        count = dict.fromkeys(learning, 0)
        for some in np.split(own, range(n_at_once, len(own), n_at_once)):
            found = detector._store_terms(store, some, index[some], device, compute)
            for k in learning:
                x = torch.from_numpy(found[k])
                total[k] += total_second_moments(x)
                count[k] += x[:, 0].numel()
        for k, whitening in learning.items():
            whitening.learn(int(c), total[k], count[k])


def _reference_terms(detector, store, rows, is_held, index, device) -> dict[str, np.ndarray]:
    """Map terms of normal images; of held-out ones as if the model's whitenings had not learned from them either.

    Of however many: a thousand vectors and more say little of a hundred directions, and one image has many of them.
    """
    terms: dict[str, np.ndarray] = {}
    for chosen, context in ((~is_held, nullcontext()), (is_held, leaving_out(detector.model_))):
        if chosen.any():
            with context:
                found = detector._store_terms(store, rows[chosen], index[rows[chosen]], device)
            for name, term in found.items():
                terms.setdefault(name, np.empty((len(rows), *term.shape[1:]), term.dtype))[chosen] = term
    return terms


def _reference_rows(index, train, held_out, n_known, seed) -> tuple[np.ndarray, np.ndarray]:
    """Images that say how high maps are, of a known category just some held out; and the other held-out ones."""
    new = np.setdiff1d(train[index[train] >= n_known], held_out)  # where too few could be held out, all are both
    chosen = [some_of_each(rows, index[rows], MAX_REFERENCE_IMAGES, seed) for rows in (new, held_out)]
    return np.concatenate(chosen), np.setdiff1d(held_out, chosen[1])


def _parts(rows: np.ndarray) -> list[np.ndarray]:
    return np.split(rows, range(IMAGES_AT_A_TIME, len(rows), IMAGES_AT_A_TIME)) if len(rows) else []


def _peak(maps: np.ndarray) -> np.ndarray:
    return maps.reshape(len(maps), -1).max(1).astype(np.float64)


def _score_all(detector, store, descriptor, rows, device) -> None:
    """Score all images learned from, and keep that with the scores of earlier calls."""
    category, excess = detector._route(descriptor[rows])
    score = [np.empty(0)]
    for place in _parts(np.arange(len(rows))):
        terms = detector._store_terms(store, rows[place], category[place], device)
        maps = detector.map_calibration_.combine(terms, category[place])
        score.append(-detector._image_score(maps, category[place], excess[place]))
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
