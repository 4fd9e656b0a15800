"""What fit and partial_fit set from normal images that were held out: the scales of maps and scores, and thresholds."""

from __future__ import annotations

import warnings

import numpy as np

from vqad.calibration import ConformalCalibration, MapCalibration, ScoreCalibration, conformal_quantile, pool_map

# Normal images of a category that say where its maps are high.
MAX_REFERENCE_IMAGES = 200


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
    reference = _reference_rows(index, train, held_out, n_known, n_categories)
    terms = detector._store_terms(store, reference, index[reference], device)
    is_held = np.isin(reference, held_out)
    held_terms = {name: term[is_held] for name, term in terms.items()}
    category = index[reference[is_held]]
    if not n_known:
        detector.map_calibration_ = MapCalibration(detector._map_weights())
        detector._held_out = {name: np.empty(0) for name in ("score", "unseen", "peak", "standard")}
        detector._held_out["category"] = np.empty(0, dtype=np.int64)
        detector._seen = {"score": np.empty(0), "category": np.empty(0, dtype=np.int64)}
    learn = detector.map_calibration_.extend if n_known else detector.map_calibration_.fit
    learn(terms, index[reference], held_terms, category, n_categories)
    score = pool_map(detector.map_calibration_.combine(held_terms, category), detector._pool_fraction)
    maps = detector.map_calibration_.leave_one_out(held_terms, category, n_known)
    found = {
        "category": category,
        "score": score,
        "unseen": pool_map(maps, detector._pool_fraction),
        "peak": maps.reshape(len(maps), -1).max(1).astype(np.float64),
        "standard": np.zeros(len(score)),
    }
    held = detector._held_out = {name: np.append(kept, found[name]) for name, kept in detector._held_out.items()}
    if not n_known:
        detector.score_calibration_ = ScoreCalibration().fit(score, category, n_categories)
    else:
        detector.score_calibration_.extend(held["score"], held["category"], np.unique(category), n_categories)
    standard = detector.score_calibration_.leave_one_out(held["score"], held["unseen"], held["category"])
    changed = np.isin(held["category"], category)
    held["standard"][changed] = standard[changed]
    if detector.contamination != "auto":
        _score_all(detector, store, descriptor, np.flatnonzero(index >= 0), device)
    _set_thresholds(detector)


def _reference_rows(index, train, held_out, n_known, n_categories) -> np.ndarray:
    """Images that say how high maps are; of a known category just those held out."""
    parts = []
    for c in range(n_categories):
        if c >= n_known:
            parts.append(train[index[train] == c][:MAX_REFERENCE_IMAGES])
        parts.append(held_out[index[held_out] == c])
    return np.concatenate(parts)


def _score_all(detector, store, descriptor, rows, device) -> None:
    """Score all images learned from, and keep that with the scores of earlier calls."""
    category, excess = detector._route(descriptor[rows])
    maps = detector.map_calibration_.combine(detector._store_terms(store, rows, category, device), category)
    found = {"score": -detector._image_score(maps, category, excess), "category": category}
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said of offset_ already
        detector.map_threshold_ = conformal_quantile(np.sort(held["peak"]), rate)
