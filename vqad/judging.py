"""The methods of a fitted detector: scores, labels, maps and explanations of images."""

from __future__ import annotations

from operator import attrgetter

import numpy as np
from sklearn.utils.validation import check_is_fitted, validate_data

from vqad._checks import check_features
from vqad.calibration import drift_p_value
from vqad.engine import Engine
from vqad.explain import explain_images
from vqad.images import check_images
from vqad.scoring import Judgement, routed_chunks
from vqad.source import MapSource
from vqad.verdicts import resize_map, verdicts_of
from vqad.workers import judge_anywhere

# Attributes that scikit-learn's checks of X set in `fit`, in addition to `fitted_`.
FORM_OF_X = ("n_features_in_", "feature_names_in_")


def _learned(path: str) -> property:
    """An attribute that is part of ``fitted_``."""
    return property(lambda self: attrgetter(path)(self.fitted_))


class Judging:
    """The methods of `BaseImageDetector` that need a fitted detector and do not change it."""

    categories_ = _learned("categories")
    offset_ = _learned("thresholds.offset")
    map_threshold_ = _learned("thresholds.map_threshold")
    conformal_ = _learned("thresholds.conformal")
    features_ = _learned("features")
    scorer_ = _learned("scorer")
    model_ = _learned("scorer.model")
    prototypes_ = _learned("prototypes")
    n_images_ = _learned("n_images")
    training_log_ = _learned("history.log")

    @property
    def fitted_(self):
        """The learned state, a `vqad.fitted.Fitted`."""
        check_is_fitted(self)
        return self._fitted

    @property
    def loss_curve_(self):
        """Training loss after each pass."""
        return list(self.fitted_.history.loss_curve)

    @property
    def validation_curve_(self):
        """Validation loss after each pass; empty without early stopping."""
        return list(self.fitted_.history.validation_curve)

    @property
    def n_iter_(self):
        """Passes that were run."""
        return len(self.fitted_.history.loss_curve)

    def score_samples(self, X):
        """How normal each image is.

        Parameters
        ----------
        X : images, or features with ``backbone=None``
            In any form that `fit` takes.

        Returns
        -------
        score : ndarray of shape (n,), float64
            Higher is more normal. 0 is a typical normal image of any category; the unit is a standard deviation of
            normal images.
        """
        return -self.judge(X, keep_maps=False).score

    def decision_function(self, X):
        """``score_samples(X) - offset_``: negative for anomalies.

        Parameters
        ----------
        X : images, or features with ``backbone=None``

        Returns
        -------
        decision : ndarray of shape (n,), float64
        """
        judged = self.judge(X, keep_maps=False)
        return judged.threshold - judged.score

    def predict(self, X):
        """Label each image: +1 normal, -1 anomaly.

        Parameters
        ----------
        X : images, or features with ``backbone=None``

        Returns
        -------
        label : ndarray of shape (n,), int
        """
        return self.judge(X, keep_maps=False).label

    def p_values(self, X):
        """Conformal p-value of the hypothesis that each image is normal, from held-out normal images.

        Parameters
        ----------
        X : images, or features with ``backbone=None``

        Returns
        -------
        p : ndarray of shape (n,), float64
            In (0, 1]. A normal image has a p-value of at most alpha with a probability of at most alpha.
        """
        return self.judge(X, keep_maps=False).p_value

    def drift(self, X):
        """Test for drift: p-value of the hypothesis that images are distributed as when the detector was fitted.

        The test detects scores that are higher than those of the images that `fit` held out, for instance because of
        another lamp, a worn tool or another camera. It tolerates a few defects among many images, but not many.

        Parameters
        ----------
        X : images, or features with ``backbone=None``
            In the order in which they were taken, without images that `fit` has seen.

        Returns
        -------
        p : float
            In (0, 1]. It is valid at any time, so you may check it after each image: without drift, the probability
            that it ever falls to alpha or less is at most alpha.

        See Also
        --------
        recalibrate : Scales and thresholds from new normal images.
        """
        now = self._now()
        fitted = now._fitted
        return drift_p_value(fitted.held_out.score, now.judge(X, keep_maps=False).score, fitted.seed)

    def judge(self, X, *, rows=None, keep_maps=True):
        """Score, threshold, p-value, label, category and map of each image, in one pass.

        Parameters
        ----------
        X : images, or features with ``backbone=None``
        rows : array-like of int, default=None
            Indices of the images to judge; None judges all.
        keep_maps : bool, default=True
            Whether to keep the maps, on the grid of the features.

        Returns
        -------
        vqad.verdicts.Verdicts
        """
        now = self._now()
        source, fitted = now.map_source(X), now._fitted
        rows = np.arange(len(source)) if rows is None else np.asarray(rows)
        hidden = source.data.subset(rows).mask if source.ignores else None
        return verdicts_of(fitted, now._judged(source, rows, keep_maps), hidden)

    def predict_category(self, X):
        """Category that each image is judged as.

        Parameters
        ----------
        X : images, or features with ``backbone=None``

        Returns
        -------
        category : ndarray of shape (n,)
            Labels as given to `fit`, or numbers if the categories were discovered.
        """
        now = self._now()
        source, scorer = now.map_source(X), now._fitted.scorer

        def route(part: np.ndarray) -> list[np.ndarray]:
            return [category for _, category, _, _ in routed_chunks(scorer, source, part)]

        return now.categories_[np.concatenate(list(source.side_by_side(route, np.arange(len(source)))))]

    def anomaly_map(self, X):
        """Where each image is anomalous, and how much.

        All maps are held in memory, four bytes per pixel: process many large photographs in parts.

        Parameters
        ----------
        X : images, or features with ``backbone=None``

        Returns
        -------
        maps : ndarray of shape (n, H, W), float32, or list of ndarray of shape (H, W)
            At the images' own size, as a list if sizes differ; on the grid of the features with ``backbone=None``.
            Higher is more anomalous, on one scale for all images: 0 is typical, and a normal image has a value above
            ``map_threshold_`` anywhere with a probability of about ``false_alarm_rate``.
        """
        now = self._now()
        source = now.map_source(X)
        maps = now._judged(source, np.arange(len(source))).maps
        sizes = [source.data.size(i) for i in range(len(source))]
        resized = (resize_map(m, size, source.mask(i)) for i, (m, size) in enumerate(zip(maps, sizes)))
        if len(set(sizes)) > 1:
            return list(resized)
        out = np.empty((len(maps), *sizes[0]), dtype=np.float32)
        for whole, m in zip(out, resized):
            whole[:] = m
        return out

    def explain(self, X):
        """What each image's map is made of: codes, distances and terms of each cell.

        Parameters
        ----------
        X : images, or features with ``backbone=None``

        Returns
        -------
        explanations : list of vqad.explain.Explanation
            One per image. ``prototypes_.of(explanation, codebook)`` is the normal patch whose code its worst cell was
            assigned.
        """
        now = self._now()
        return explain_images(now._fitted, now.map_source(X))

    # ---------------------------------------------------------------- helpers of the methods

    def _snapshot(self, fresh=False):
        """A shallow copy, which another thread's fit does not change; ``fresh`` drops what describes X."""
        now = object.__new__(type(self))
        vars(now).update({k: v for k, v in vars(self).copy().items() if not (fresh and k in FORM_OF_X)})
        return now

    def _now(self):
        """The `_snapshot` that methods of a fitted detector work with; raises NotFittedError before `fit`."""
        now = self._snapshot()
        check_is_fitted(now)
        return now

    def map_source(self, X) -> MapSource:
        """Check X and give its feature maps, as a `MapSource`."""
        return self._source_of(self._check_X(X, self._fitted))

    def _judged(self, source: MapSource, rows: np.ndarray, keep_maps: bool = True) -> Judgement:
        """Judge images in one pass, here or on workers."""
        return judge_anywhere(self._fitted.scorer, source, rows, keep_maps, (self.device, self.precision))

    def _source_of(self, data) -> MapSource:
        fitted = self._fitted
        engine = Engine.pick(self.device, self.precision)
        return self._map_source(data, fitted.features, engine, fitted.map_shape, fitted.ignore, fitted.tiles)

    def _map_source(self, data, features, engine, map_shape, ignore, tiles) -> MapSource:
        # The fitted backbone may come from another machine, with another device.
        override = {"device": engine.device, "precision": self.precision} if isinstance(self.backbone, str) else {}
        return MapSource(
            data, features, engine,
            map_shape=map_shape, ignore=ignore, tiles=tiles, memory=self.memory, n_jobs=self.n_jobs, **override,
        )  # fmt: skip

    def _check_X(self, X, before):
        """Check images or features, which must have the form of those learned ``before``, if any."""
        if self.backbone is None:
            return check_features(self, X, None if before is None else before.map_shape)
        is_table = isinstance(X, np.ndarray) or hasattr(X, "iloc")
        if is_table and X.ndim == 2 and self.image_shape is not None:
            X = validate_data(self, X, reset=before is None, ensure_all_finite=False, dtype=None)
        return check_images(X, image_shape=None if self.image_shape is None else tuple(self.image_shape))

    def __sklearn_is_fitted__(self):
        return hasattr(self, "_fitted")
