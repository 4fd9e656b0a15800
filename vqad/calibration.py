"""Scales, thresholds and p-values from the scores of normal images, above all of held-out ones."""

from __future__ import annotations

import copy
import math
import warnings
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor

from vqad._warn import warn
from vqad.engine import Engine, side_by_side
from vqad.scoring import FAR_WEIGHT, Scorer, fields, score_and_map, stored_images
from vqad.splitting import some_of_each
from vqad.store import FeatureStore

# Images whose maps are in memory at a time.
IMAGES_AT_A_TIME = 512
# Largest number of images of a category that its terms are learned from, of those trained on and of those held out.
MAX_REFERENCE_IMAGES = 200
# Folds of cross-fitting: each is measured by what was learned from the others.
N_FOLDS = 10


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
        """Conformal p-value of each score, (n,) in (0, 1]; category (n,) is that of each image."""
        out = np.empty(len(score))
        group = category if self.per_category else np.zeros(len(score), dtype=int)
        for c in np.unique(group):
            rows, known = group == c, self.scores_[c]
            at_least = len(known) - np.searchsorted(known, score[rows], side="left")
            out[rows] = (1 + at_least) / (len(known) + 1)
        return out

    def thresholds(self, rate: float, names: Any = None) -> np.ndarray:
        """Anomaly scores above which images are called anomalous, for a false-alarm rate of at most ``rate``.

        Parameters
        ----------
        rate : float in (0, 1)
        names : sequence, optional
            Names of the categories, for warnings.

        Returns
        -------
        threshold : ndarray of shape (n_groups,)
            One per category, or a single one.

        Warns
        -----
        UserWarning
            When there are too few images for that rate, in which case the largest calibration score is used; when all
            calibration scores are equal.
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
            f"All {n} held-out calibration images{of} have the same score: they may be copies of one picture. Any "
            "other image may then be called an anomaly. Give images that vary as normal ones do."
        )
    rank = math.ceil((n + 1) * (1 - rate) - 1e-9)
    if rank > n:
        if n == 0:
            raise ValueError(f"There are no calibration images{of}: raise calibration_fraction or give more images.")
        warn(
            f"{n} held-out calibration images{of} are too few for false_alarm_rate={rate:g}. The smallest rate that "
            f"they support, {1 / (n + 1):.3g}, is used. Give more images or raise calibration_fraction."
        )
        return float(scores[-1])
    return float(scores[max(rank, 1) - 1])


def drift_p_value(held_out: np.ndarray, score: np.ndarray, seed: int = 0) -> float:
    r"""P-value of the hypothesis that new images are exchangeable with the held-out ones; valid at any stopping time.

    Each image in turn is ranked among the held-out images and the new ones before it. Under exchangeability the ranks,
    with ties broken at random, give independent uniform p-values :math:`p_1, p_2, \dots` (Vovk, Nouretdinov,
    Gammerman: Testing Exchangeability On-Line, ICML 2003). Bets on them are martingales:

    .. math:: \prod_i \epsilon p_i^{\epsilon - 1}, \qquad \prod_i (1 - w + w \, [p_i \le q_i] / q_i), \quad
              q_i = \frac{i + 4}{m + i + 4}.

    The first grows when scores rise a little, the second when new images score above all held-out ones. By Ville's
    inequality, their mean over :math:`\epsilon` and w ever reaches :math:`1/\alpha` with a probability of at most
    :math:`\alpha`.

    Parameters
    ----------
    held_out : ndarray of shape (m,)
        Anomaly scores of normal images.
    score : ndarray of shape (n,)
        Anomaly scores of the new images, in the order in which they were taken.
    seed : int, default=0
        Breaks ties.

    Returns
    -------
    p : float
        In (0, 1]; 1 if there are no new images.
    """
    known, rng = sorted(held_out.tolist()), np.random.RandomState(seed % 2**32)
    log_p = np.zeros(len(score) + 1)
    for k, s in enumerate(score.tolist(), 1):
        first, last = bisect_left(known, s), bisect_right(known, s)
        log_p[k] = math.log((len(known) - last + (last - first + 1) * (1.0 - rng.uniform())) / (len(known) + 1))
        known.insert(last, s)
    n, epsilon, share = np.arange(len(log_p))[:, None], np.linspace(0.05, 0.95, 19), np.linspace(0.05, 0.95, 19)
    powers = n * np.log(epsilon) + np.cumsum(log_p)[:, None] * (epsilon - 1.0)
    top = (n + 4) / (len(held_out) + n + 4)
    odds = 1.0 - share + share / top * (log_p[:, None] <= np.log(top))
    steps = np.cumsum(np.where(n > 0, np.log(odds), 0.0), axis=0)
    log_bets = np.concatenate([powers, steps], axis=1)
    return math.exp(-max(0.0, float(logsumexp(log_bets, axis=1).max()) - math.log(log_bets.shape[1])))


# ---- what is learned ---------------------------------------------------------------------------------


def _none() -> np.ndarray:
    return np.empty(0)


def _no_category() -> np.ndarray:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out normal images, from which thresholds are set.

    Attributes
    ----------
    category : ndarray of shape (n,), int64
    score, peak : ndarray of shape (n,), float64
        Anomaly score and highest map value of each image, computed as if it had not contributed to the scales.
    """

    category: np.ndarray = field(default_factory=_no_category)
    score: np.ndarray = field(default_factory=_none)
    peak: np.ndarray = field(default_factory=_none)

    def __len__(self) -> int:
        return len(self.score)

    def append(self, more: HeldOut) -> HeldOut:
        """These and more."""
        return HeldOut(*(np.append(a, b) for a, b in zip(vars(self).values(), vars(more).values())))


@dataclass(frozen=True, eq=False)
class Seen:
    """Anomaly scores of all images given to `fit`, if ``contamination`` needs them.

    Attributes
    ----------
    category : ndarray of shape (n,), int64
    score : ndarray of shape (n,), float64
    """

    category: np.ndarray = field(default_factory=_no_category)
    score: np.ndarray = field(default_factory=_none)

    def append(self, more: Seen) -> Seen:
        """These and more."""
        return Seen(np.append(self.category, more.category), np.append(self.score, more.score))


@dataclass(frozen=True, eq=False)
class Thresholds:
    """Thresholds of image scores and of maps.

    Attributes
    ----------
    offset : float or ndarray of shape (n_categories,)
        Images are anomalous if ``score_samples`` is below it.
    map_threshold : float
        Map values above it are anomalous.
    conformal : ConformalCalibration
        For p-values.
    rate : float
        False-alarm rate for which the thresholds were set.
    origin : str or None
        How the offset was set, if not for a rate.
    """

    offset: Any
    map_threshold: float
    conformal: ConformalCalibration
    rate: float
    origin: str | None = None

    def offset_of(self, category: np.ndarray) -> Any:
        """Offset for images judged as these categories, (n,) int64."""
        return self.offset if np.isscalar(self.offset) else self.offset[category]


class Learned(NamedTuple):
    """Images that were learned from, as input of the functions that set scales and thresholds.

    Attributes
    ----------
    store : FeatureStore
    descriptor : ndarray of shape (n, D)
    category : ndarray of shape (n,)
        Number of each image's category; -1 for images to leave out.
    train, held_out : ndarray of int
        Rows of ``store``.
    groups : ndarray of shape (n,) or None
        Number of each image's piece.
    """

    store: FeatureStore
    descriptor: np.ndarray
    category: np.ndarray
    train: np.ndarray
    held_out: np.ndarray
    groups: np.ndarray | None


def learn_terms(scorer: Scorer, learned: Learned, engine: Engine, seed: int) -> tuple[Scorer, HeldOut]:
    """Learn the terms of the categories that a scorer does not know yet.

    Known categories keep their scales.

    Returns
    -------
    scorer : Scorer
        A new one; the given one does not change.
    held_out : HeldOut
        Held-out images of ``learned``, including those of known categories.
    """
    terms, (store, _, index, train, held_out, groups) = copy.deepcopy(scorer.terms), learned
    n_categories, n_known = scorer.router.n_categories, 0 if terms is None else terms.n_categories
    if terms is not None:
        terms.add_categories(n_categories - n_known)
    reference, others = _reference_rows(index, train, held_out, n_known, seed)
    rows_of = {c: reference[index[reference] == c] for c in range(n_known, n_categories)}
    rows_of = {c: rows for c, rows in rows_of.items() if len(rows)}

    def fields_of(c: int) -> dict[str, Tensor]:
        rows = rows_of[c]
        found = stored_images(scorer, store, rows, index[rows], engine, fields)
        return {name: torch.from_numpy(each) for name, each in found.items()}

    if terms is None:
        shapes = {name: _shape(each) for name, each in fields_of(next(iter(rows_of))).items()}
        terms = scorer.new_terms(shapes, n_categories)

    def learn(categories: np.ndarray) -> list[HeldOut]:
        judged = []
        for c in categories.tolist():
            is_held, fold = np.isin(rows_of[c], held_out), _folds(rows_of[c], groups, seed)
            score, peak = terms.learn(c, fields_of(c), torch.from_numpy(fold), torch.from_numpy(is_held))
            own = np.full(len(score), c), score.double().numpy(), peak.double().numpy()
            judged.append(HeldOut(*(each[is_held] for each in own)))
        return judged

    # Many small decompositions, which do not profit from threads: one core per category.
    judged = HeldOut()
    for own in side_by_side(learn, np.array(list(rows_of), dtype=np.int64), torch.device("cpu")):
        judged = judged.append(own)
    scorer = scorer.with_terms(terms)
    for part in _parts(others):
        found = stored_images(scorer, store, part, index[part], engine, score_and_map)
        peak_of = found["map"].reshape(len(part), -1).max(1).astype(np.float64)
        judged = judged.append(HeldOut(index[part], found["score"].astype(np.float64), peak_of))
    return scorer, judged


def score_seen(scorer: Scorer, learned: Learned, engine: Engine) -> Seen:
    """Score all images learned from like new images, routing included."""
    rows, seen = np.flatnonzero(learned.category >= 0), Seen()
    for part in _parts(rows):
        with torch.inference_mode():
            category, distance = scorer.router(torch.from_numpy(learned.descriptor[part]))
            excess = scorer.router.excess(category, distance).numpy()
        found = stored_images(scorer, learned.store, part, category.numpy(), engine, score_and_map)
        seen = seen.append(Seen(category.numpy(), found["score"] + FAR_WEIGHT * excess))
    return seen


def set_thresholds(
    held_out: HeldOut, seen: Seen, categories: np.ndarray, contamination: Any, rate: float, per_category: bool
) -> Thresholds:
    """Thresholds for a false-alarm rate, from held-out images, or for a contamination, from all images."""
    n_categories = len(categories)
    conformal = ConformalCalibration(per_category).fit(held_out.score, held_out.category, n_categories)
    if contamination == "auto":
        offset = -conformal.thresholds(rate, categories)
    else:
        groups = [seen.category == c for c in range(n_categories)] if per_category else []
        own = [seen.score[group] if group.any() else seen.score for group in groups or [seen.category >= 0]]
        offset = np.array([np.quantile(-s, contamination) for s in own])
    with warnings.catch_warnings():
        if contamination == "auto":
            warnings.simplefilter("ignore", UserWarning)  # the offset has just raised the same warning
        map_threshold = conformal_quantile(np.sort(held_out.peak), rate)
    return Thresholds(offset if per_category else float(offset[0]), map_threshold, conformal, rate)


def _shape(field: Tensor) -> tuple[int, int, int]:
    """Length of a field's vectors (0 if it holds numbers), rows and columns."""
    d, h, w = field.shape[1:] if field.ndim == 4 else (0, *field.shape[1:])
    return d, h, w


def _folds(rows: np.ndarray, groups: np.ndarray | None, seed: int) -> np.ndarray:
    """Fold of each image, the same for all images of a group."""
    unit = np.arange(len(rows)) if groups is None else np.unique(groups[rows], return_inverse=True)[1]
    n_units = unit.max() + 1
    fold: np.ndarray = (np.random.RandomState(seed % 2**32).permutation(n_units) % min(N_FOLDS, n_units))[unit]
    return fold


def _reference_rows(
    index: np.ndarray, train: np.ndarray, held_out: np.ndarray, n_known: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images that new categories are learned from, and all other held-out ones, including known categories'."""
    new = np.setdiff1d(train[index[train] >= n_known], held_out)  # if too few could be held out, all are in both
    held = held_out[index[held_out] >= n_known]
    chosen = [some_of_each(rows, index[rows], MAX_REFERENCE_IMAGES, seed) for rows in (new, held)]
    return np.sort(np.concatenate(chosen)), np.setdiff1d(held_out, chosen[1])


def _parts(rows: np.ndarray) -> list[np.ndarray]:
    return np.split(rows, range(IMAGES_AT_A_TIME, len(rows), IMAGES_AT_A_TIME)) if len(rows) else []
