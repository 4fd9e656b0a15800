"""From raw map terms to scores that compare: standardisation, thresholds, p-values. NumPy only."""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

from vqad._warn import warn

# A category's statistics count as much as its pooled or location-free ones when it has this many images.
SHRINKAGE_IMAGES = 20
# Of fewer cells than these in all no scale of a category's terms is learned: two feature rows would give any.
MIN_SCALE_CELLS = 20
# Up to so many held-out images of a category, each is left out of its scales; of more, one hardly counts.
MAX_LEFT_OUT = 100
# Standard deviations become comparable to a location's neighbours by this blur, in cells.
LOCATION_BLUR = 1.5
# Images whose maps are put together at a time: what lies in between is many times as large.
IMAGES_AT_A_TIME = 512
NORMAL_CONSISTENCY = 1.4826  # median absolute deviation to standard deviation, of a normal distribution


class MapCalibration:
    r"""Puts the terms of an anomaly map on one scale, per category and location, and adds them up.

    A term :math:`t` at cell :math:`x` of an image of category :math:`c` becomes

    .. math:: z_t(x) = \frac{1}{b_{ct}} \left( \frac{t(x) - \mu_{ct}(x)}{\sigma_{ct}(x)} - a_{ct} \right)

    where :math:`\mu, \sigma` are the mean and standard deviation over normal images at that place, blurred, and
    shrunk to the category's mean values when images are few; :math:`a, b` the median and a robust standard deviation
    over the cells of held-out normal images, or 0 and 1 where these are fewer than 20 cells in all. Without the
    location, what always looks odd about a product (its border, an edge in the background) would hide what is odd about
    one piece of it. The map is the weighted mean of the terms.

    Attributes
    ----------
    terms_ : tuple of str
    mean_, spread_ : ndarray of shape (n_categories, n_terms, h, w), float32
    center_, scale_ : ndarray of shape (n_categories, n_terms), float32
    """

    def __init__(self, weights: dict[str, float] | None = None):
        self.weights = weights

    def fit(
        self,
        reference: dict[str, np.ndarray],
        reference_category: np.ndarray,
        held_out: dict[str, np.ndarray],
        held_out_category: np.ndarray,
        n_categories: int,
    ) -> MapCalibration:
        """Learn the scales.

        Parameters
        ----------
        reference : dict of ndarray of shape (n, h, w)
            Terms of normal images, which may have been trained on: they say where a category is high.
        held_out : dict of ndarray of shape (m, h, w)
            Terms of normal images that were not trained on: they say how high normal is.
        """
        names = reference if self.weights is None else self.weights
        self.terms_ = tuple(name for name in names if name in reference)
        self.weight_ = np.array([1.0 if self.weights is None else self.weights[n] for n in self.terms_], np.float32)
        self.weight_ /= self.weight_.sum()
        shape = (0, len(self.terms_), *reference[self.terms_[0]].shape[1:])
        self.mean_, self.spread_ = np.zeros(shape, np.float32), np.ones(shape, np.float32)
        self.center_, self.scale_ = np.zeros(shape[:2], np.float32), np.ones(shape[:2], np.float32)
        return self.extend(reference, reference_category, held_out, held_out_category, n_categories)

    def extend(
        self,
        reference: dict[str, np.ndarray],
        reference_category: np.ndarray,
        held_out: dict[str, np.ndarray],
        held_out_category: np.ndarray,
        n_categories: int,
    ) -> MapCalibration:
        """Learn the scales of further categories, up to ``n_categories`` in all; the known ones keep every bit."""
        n_known = len(self.center_)
        grown = range(n_known, n_categories)
        self.mean_, self.spread_, self.center_, self.scale_ = (
            np.concatenate([kept, np.full((len(grown), *kept.shape[1:]), value, np.float32)])
            for kept, value in ((self.mean_, 0), (self.spread_, 1), (self.center_, 0), (self.scale_, 1))
        )
        for c in grown:
            rows = self._stack(reference, reference_category == c)
            if len(rows):
                self.mean_[c], self.spread_[c] = _location_statistics(rows)
        count = np.bincount(held_out_category[held_out_category >= n_known], minlength=n_categories)
        for c in grown:
            if count[c] > 1:
                self._set_scale([c], held_out, held_out_category, held_out_category == c)
        # One image alone does not say where the middle is.
        alone = [c for c in grown if count[c] < 2]
        if alone:
            self._set_scale(alone, held_out, held_out_category, held_out_category >= n_known)
        return self

    def _set_scale(self, categories: list[int], held_out, held_out_category, rows: np.ndarray) -> None:
        cells = self._cells(held_out, held_out_category, rows)
        if cells.shape[1] >= MIN_SCALE_CELLS:
            self.center_[categories], self.scale_[categories] = _robust(cells)

    def combine(self, terms: dict[str, np.ndarray], category: np.ndarray) -> np.ndarray:
        """The standardised map, (n, h, w) float32, of raw terms (n, h, w) and category numbers (n,)."""
        maps = np.empty(terms[self.terms_[0]].shape, dtype=np.float32)
        for start in range(0, len(maps), IMAGES_AT_A_TIME):
            part = slice(start, start + IMAGES_AT_A_TIME)
            z = self.standardise({name: terms[name][part] for name in self.terms_}, category[part])
            maps[part] = np.einsum("t,nthw->nhw", self.weight_, z, dtype=np.float32)
        return maps

    def standardise(self, terms: dict[str, np.ndarray], category: np.ndarray) -> np.ndarray:
        """Each term in units of its category's normal images, (n, n_terms, h, w) float32, in the order ``terms_``."""
        z = self._locate(self._stack(terms), category)
        z -= self.center_[category][:, :, None, None]
        z /= self.scale_[category][:, :, None, None]
        return z

    def leave_one_out(self, held_out: dict[str, np.ndarray], category: np.ndarray, n_known: int = 0) -> np.ndarray:
        """The maps of the held-out images of `fit`, each as if it had taken no part in its category's center and scale.

        Where a category has many held-out images one of them makes no difference, and the map is that of `combine`;
        and so it is where too few cells gave no scale, and for the first ``n_known`` categories, whose scales `extend`
        did not learn from these images.
        """
        maps = self.combine(held_out, category)
        n_cells = maps[0].size
        for c in np.unique(category[category >= n_known]):
            rows = np.flatnonzero(category == c)
            # In the place of a category's only image stand those of the others.
            beside = rows if len(rows) > 1 else np.flatnonzero(category >= n_known)
            if len(beside) * n_cells < MIN_SCALE_CELLS or len(beside) > MAX_LEFT_OUT:
                continue
            cells = self._cells(held_out, category, beside).reshape(len(self.terms_), len(beside), n_cells)
            for i in rows if len(beside) > 1 else ():
                is_own = beside == i
                center, scale = _robust(cells[:, ~is_own].reshape(len(self.terms_), -1))
                left_out = (cells[:, is_own][:, 0] - center[:, None]) / scale[:, None]
                maps[i] = (self.weight_ @ left_out).reshape(maps[i].shape)
        return maps

    def _stack(self, terms: dict[str, np.ndarray], rows=slice(None)) -> np.ndarray:
        return np.stack([terms[name][rows] for name in self.terms_], axis=1)

    def _cells(self, terms: dict[str, np.ndarray], category: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Located terms of all cells of some images, (n_terms, n_cells)."""
        located = self._locate(self._stack(terms, rows), category[rows])
        return located.transpose(1, 0, 2, 3).reshape(len(self.terms_), -1)

    def _locate(self, terms: np.ndarray, category: np.ndarray) -> np.ndarray:
        return ((terms - self.mean_[category]) / self.spread_[category]).astype(np.float32)


def _location_statistics(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per location of (n, n_terms, h, w), blurred and shrunk."""
    n = len(rows)
    keep = n / (n + SHRINKAGE_IMAGES)
    blur = (0, LOCATION_BLUR, LOCATION_BLUR)
    mean = ndimage.gaussian_filter(rows.mean(0, dtype=np.float64), blur, mode="nearest")
    variance = ndimage.gaussian_filter(rows.var(0, dtype=np.float64), blur, mode="nearest")
    flat_mean = rows.mean((0, 2, 3), dtype=np.float64)[:, None, None]
    flat_variance = rows.var((0, 2, 3), dtype=np.float64)[:, None, None]
    mean = keep * mean + (1 - keep) * flat_mean
    # A tenth of the overall variance always stays: where normal images happen to agree, nothing would divide.
    variance = keep * (0.9 * variance + 0.1 * flat_variance) + (1 - keep) * flat_variance
    tiny = np.maximum(1e-6 * np.abs(flat_mean), 1e-12)
    return mean, np.maximum(np.sqrt(variance), tiny)


def _robust(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median and robust standard deviation along the last axis."""
    center = np.median(values, axis=-1)
    scale = NORMAL_CONSISTENCY * np.median(np.abs(values - center[..., None]), axis=-1)
    fallback = values.std(-1)
    scale = np.where(scale > 1e-12, scale, np.where(fallback > 1e-12, fallback, 1.0))
    return center, scale


class ScoreCalibration:
    """Standardises image scores per category, so that one image's score means the same whatever it shows.

    A category's median and spread over held-out normal images, pulled towards the pooled spread when they are few; of
    all categories where there is a single one.

    Parameters
    ----------
    fraction : float, default=0.01
        An image's raw score is the mean of this share of the highest cells of its map (docs/choices.md).
    """

    def __init__(self, fraction: float = 0.01):
        self.fraction = fraction

    def pool(self, maps: np.ndarray) -> np.ndarray:
        """Raw image scores (n,) of maps (n, h, w)."""
        return pool_map(maps, self.fraction)

    def fit(self, score: np.ndarray, category: np.ndarray, n_categories: int) -> ScoreCalibration:
        self.center_ = np.full(n_categories, np.median(score))
        self.scale_ = np.ones(n_categories)
        present = [c for c in range(n_categories) if (category == c).sum() > 1]
        for c in present:
            self.center_[c] = np.median(score[category == c])
        residual = score - self.center_[category]
        self.pooled_scale_ = float(_robust(residual[None])[1][0])
        self.scale_[:] = self.pooled_scale_
        for c in present:
            self.scale_[c] = self._shrunk_scale(residual[category == c])
        return self

    def extend(self, score: np.ndarray, category: np.ndarray, changed: np.ndarray, n_categories: int) -> None:
        """Learn the scores of categories anew, or of new ones; the others, and the pooled spread, keep every bit.

        Parameters
        ----------
        score, category : ndarray of shape (n,)
            Of all held-out images so far.
        changed : ndarray of int
            Categories that have new ones among them.
        """
        more = n_categories - len(self.center_)
        self.center_ = np.append(self.center_, np.full(more, np.median(score)))
        self.scale_ = np.append(self.scale_, np.full(more, self.pooled_scale_))
        for c in changed:
            own = score[category == c]
            if len(own) > 1:
                self.center_[c] = np.median(own)
                self.scale_[c] = self._shrunk_scale(own - self.center_[c])

    def _shrunk_scale(self, residual: np.ndarray) -> float:
        if len(residual) == 1:  # the only one beside an image that is left out, and its own center
            return self.pooled_scale_
        keep = len(residual) / (len(residual) + SHRINKAGE_IMAGES)
        return keep * float(_robust(residual[None])[1][0]) + (1 - keep) * self.pooled_scale_

    def transform(self, score: np.ndarray, category: np.ndarray) -> np.ndarray:
        """Standardised scores, (n,) float64, of raw scores (n,) and category numbers (n,)."""
        return (score - self.center_[category]) / self.scale_[category]

    def leave_one_out(
        self, score: np.ndarray, unseen: np.ndarray, category: np.ndarray, wanted: np.ndarray | None = None
    ) -> np.ndarray:
        """Standardised scores of the images of `fit`, each as if it had taken no part in its category's scale.

        Thresholds come from these: with few images a category, its median lies too close to each of them. In the
        place of a category's only image stand the images of the others; and with many, one makes no difference.

        Parameters
        ----------
        score : ndarray of shape (n,)
            As given to `fit`.
        unseen : ndarray of shape (n,)
            The raw score of each image from a map that it took no part in calibrating.
        wanted : ndarray of int, optional
            Categories to work out; 0 for images of others.
        """
        out = np.zeros(len(score))
        for c in np.unique(category) if wanted is None else wanted:
            rows = np.flatnonzero(category == c)
            if len(rows) > MAX_LEFT_OUT:
                out[rows] = self.transform(unseen[rows], category[rows])
                continue
            for i in rows:
                own = score[rows[rows != i]]
                if len(own):
                    center = np.median(own)
                    out[i] = (unseen[i] - center) / self._shrunk_scale(own - center)
                elif len(score) > 1:
                    out[i] = (unseen[i] - np.median(np.delete(score, i))) / self.pooled_scale_
        return out


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


def pool_map(maps: np.ndarray, fraction: float) -> np.ndarray:
    """Image score of maps (n, h, w): the mean of the highest ``fraction`` of the cells, at least one."""
    flat = maps.reshape(len(maps), -1)
    k = max(1, round(fraction * flat.shape[1]))
    top = np.partition(flat, flat.shape[1] - k, axis=1)[:, -k:]
    return top.mean(1, dtype=np.float64)
