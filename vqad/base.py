"""The estimator contract, written once: everything that a detector does but its model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, OutlierMixin, clone
from sklearn.exceptions import NotFittedError
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from tqdm.auto import tqdm

from vqad._checks import check_category, check_features, normal_rows, split_rows
from vqad.calibration import (
    ConformalCalibration,
    MapCalibration,
    ScoreCalibration,
    conformal_quantile,
    pool_map,
)
from vqad.features import BackboneFeatures
from vqad.images import check_images
from vqad.routing import CategoryRouter
from vqad.store import (
    FeatureArray,
    FeatureStore,
    ScaledFeatures,
    TrainingBatches,
    channel_statistics,
    chunk_size,
    describe,
    pad_chunk,
)
from vqad.training import Trainer, native_precision, pick_device, seeded, to_device

# Normal images of a category that say where its maps are high.
MAX_REFERENCE_IMAGES = 200
# An image this many times as far from its category as the farthest hundredth of normal images belongs to none.
FAR = 1.5
# What such an image's score grows by for every further such distance, in standard deviations of normal scores.
FAR_WEIGHT = 10.0


class Judgement(NamedTuple):
    """What is known of some images after one pass over them.

    Attributes
    ----------
    score : ndarray of shape (n,)
        Higher is more anomalous; standardised per category.
    category : ndarray of shape (n,), int64
    maps : ndarray of shape (n, h, w), float32
        Standardised, on the grid of the features.
    """

    score: np.ndarray
    category: np.ndarray
    maps: np.ndarray


class BaseImageDetector(OutlierMixin, BaseEstimator):
    """Base of the detectors: images in, frozen features, routing, training, calibration, scores.

    A detector adds its parameters and four hooks: ``_make_model(channels, shapes, n_categories)`` returns the
    module, with the methods ``loss``, ``anomaly_map`` and ``initialise_codes``; ``_plan()`` the `TrainingPlan`;
    ``_feature_options()`` says what it wants of `BackboneFeatures`, ``_map_weights()`` how the terms of the map add up.
    """

    _parameter_constraints: dict = {
        "backbone": [str, HasMethods(["fit", "transform"]), None],
        "weights": [str, Path, None],
        "image_size": [Interval(Integral, 1, None, closed="left"), tuple, list],
        "image_shape": [tuple, list, None],
        "standardize": ["boolean"],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "contamination": [StrOptions({"auto"}), Interval(Real, 0, 0.5, closed="right")],
        "false_alarm_rate": [Interval(Real, 0, 1, closed="neither")],
        "calibration_fraction": [Interval(Real, 0, 1, closed="neither")],
        "threshold": [StrOptions({"global", "category"})],
        "device": [str, torch.device],
        "precision": [StrOptions({"auto", "float32", "bfloat16"})],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    # ---------------------------------------------------------------- fitting

    def fit(self, X, y=None, *, category=None):
        """Learn what normal looks like.

        Parameters
        ----------
        X : images, or features with ``backbone=None``
            Array (n, H, W) or (n, H, W, C), list of images, file paths, or a `vqad.datasets` collection.
        y : None or array-like of shape (n,) of +1 / -1, default=None
            Images labelled -1 are left out.
        category : array-like of shape (n,) of str or int, default=None
            The kind of object on each image. Discovered when left out. Never needed again.

        Returns
        -------
        self : object

        Raises
        ------
        ValueError
            When X has the wrong form, an image cannot be read or a parameter is out of its range.
        FileNotFoundError
            When the backbone's weights are not on this machine.
        """
        self._validate_params()
        data = self._check_X(X, reset=True)
        rows, category = normal_rows(y, len(data)), check_category(category, len(data))
        if len(rows) == 0:
            raise ValueError("No normal image to learn from: every y is -1.")
        if len(rows) == 1:
            raise ValueError(
                "At least 2 normal images are needed, one to learn from and one to set the threshold; got n_samples=1."
            )
        vars(self).pop("map_threshold_", None)  # a fit that fails leaves nothing that looks fitted
        device = pick_device(self.device)
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        with seeded(seed, device):
            store, descriptor = self._extract(data, rows, device)
            self._fit_from_features(store, descriptor, None if category is None else category[rows], device, seed)
        return self

    def fit_predict(self, X, y=None, *, category=None):
        """Fit, then label the same images: +1 normal, -1 anomaly.

        Returns
        -------
        label : ndarray of shape (n,), int
        """
        return self.fit(X, y, category=category).predict(X)

    def _fit_from_features(self, store, descriptor, category, device, seed) -> None:
        self.router_ = CategoryRouter()
        index = self.router_.fit(descriptor, category, random_state=seed)
        self.categories_ = self.router_.categories_
        self._distance_limit = self._far_limits(descriptor, index)
        self.n_images_ = len(index)
        n_categories = len(self.categories_)
        train, held_out = split_rows(index, self.calibration_fraction, seed)
        validation = None
        alone = np.setdiff1d(np.arange(n_categories), index[held_out])
        if self.threshold == "category" and len(alone):
            raise ValueError(
                f"threshold='category' needs at least 2 images of every category; {self.categories_[alone[0]]} has 1."
            )
        if self.early_stopping:
            keep, chosen = split_rows(index[train], self.validation_fraction, seed + 1)
            train, validation = train[keep], train[chosen]
        self.feature_mean_, self.feature_scale_ = channel_statistics(store, train, self.standardize)
        scaled = ScaledFeatures(store, self.feature_mean_, self.feature_scale_)
        category_tensor = torch.from_numpy(index)

        self.model_ = self._make_model(
            [m.shape[1] for m in store.maps], [tuple(m.shape[2:]) for m in store.maps], n_categories
        )
        self._initialise(TrainingBatches(scaled, category_tensor, torch.from_numpy(train), self.batch_size))
        trainer = Trainer(
            self.model_, scaled, category_tensor, self._plan(),
            device=device, dtype=native_precision(device, self.precision),
        )  # fmt: skip
        log = trainer.fit(torch.from_numpy(train), None if validation is None else torch.from_numpy(validation))
        self.training_log_ = log
        self.loss_curve_, self.n_iter_ = log.loss_curve, log.n_iter
        self.validation_curve_ = log.validation_curve
        self._calibrate(store, descriptor, index, train, held_out, device)

    def _initialise(self, batches) -> None:
        """Start the model's codes from data."""
        self.model_.initialise_codes(batches)

    def _far_limits(self, descriptor, index) -> np.ndarray:
        """Distance from each category's mean beyond which an image belongs to no category."""
        _, distance = self.router_.predict(descriptor)
        return np.array(
            [FAR * np.quantile(distance[index == c], 0.99) + 1e-9 if (index == c).any() else np.inf
             for c in range(len(self.categories_))]
        )  # fmt: skip

    def _calibrate(self, store, descriptor, index, train, held_out, device) -> None:
        """Set scales, thresholds and ``offset_`` from held-out normal images."""
        n_categories = len(self.categories_)
        reference = np.concatenate(
            [np.append(train[index[train] == c][:MAX_REFERENCE_IMAGES], held_out[index[held_out] == c])
             for c in range(n_categories)]
        )  # fmt: skip
        terms = self._store_terms(store, reference, index[reference], device)
        is_held = np.isin(reference, held_out)
        held_terms = {name: term[is_held] for name, term in terms.items()}
        held = reference[is_held]
        self.map_calibration_ = MapCalibration(self._map_weights()).fit(
            terms, index[reference], held_terms, index[held], n_categories
        )
        maps = self.map_calibration_.combine(held_terms, index[held])
        raw = pool_map(maps, self._pool_fraction)
        self.score_calibration_ = ScoreCalibration().fit(raw, index[held], n_categories)
        maps = self.map_calibration_.leave_one_out(held_terms, index[held])
        score = self.score_calibration_.leave_one_out(raw, pool_map(maps, self._pool_fraction), index[held])
        self.conformal_ = ConformalCalibration(self.threshold == "category").fit(score, index[held], n_categories)
        if self.contamination == "auto":
            self.offset_ = -self.conformal_.thresholds(self.false_alarm_rate, self.categories_)
        else:
            self.offset_ = self._contamination_offset(store, descriptor, np.arange(len(store)), device)
        if self.threshold == "global":
            self.offset_ = float(self.offset_[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # said of offset_ already
            self.map_threshold_ = conformal_quantile(np.sort(maps.reshape(len(maps), -1).max(1)), self.false_alarm_rate)

    def _contamination_offset(self, store, descriptor, rows, device) -> np.ndarray:
        category, excess = self._route(descriptor[rows])
        maps = self.map_calibration_.combine(self._store_terms(store, rows, category, device), category)
        score = -self._image_score(maps, category, excess)
        groups = range(len(self.categories_)) if self.threshold == "category" else [None]
        own = [score if c is None or not (category == c).any() else score[category == c] for c in groups]
        return np.array([np.quantile(s, self.contamination) for s in own])

    # ---------------------------------------------------------------- scoring

    def score_samples(self, X):
        """How normal each image is.

        Returns
        -------
        score : ndarray of shape (n,), float64
            Higher is more normal. 0 is the typical normal image of any category; the unit is a standard
            deviation of normal images.
        """
        return -self._judge(X).score

    def decision_function(self, X):
        """``score_samples(X) - offset_``: negative for anomalies.

        Returns
        -------
        decision : ndarray of shape (n,), float64
        """
        judged = self._judge(X)
        return -judged.score - self._offset_of(judged.category)

    def predict(self, X):
        """+1 for normal images, -1 for anomalies.

        Returns
        -------
        label : ndarray of shape (n,), int
        """
        return np.where(self.decision_function(X) < 0, -1, 1)

    def p_values(self, X):
        """Conformal p-value of "this image is normal", from held-out normal images.

        Returns
        -------
        p : ndarray of shape (n,), float64
            In (0, 1]. Of normal images at most a share of alpha has a p-value of alpha or less.
        """
        judged = self._judge(X)
        return self.conformal_.p_values(judged.score, judged.category)

    def predict_category(self, X):
        """Which category each image was judged as.

        Returns
        -------
        category : ndarray of shape (n,)
            Labels as given to fit, or numbers where the categories were discovered.
        """
        check_is_fitted(self)
        data = self._check_X(X)
        device = pick_device(self.device)
        parts = [self._route(describe(maps))[0] for _, maps in self._iter_features(data, device)]
        return self.categories_[np.concatenate(parts)]

    def anomaly_map(self, X):
        """Where each image is anomalous, and how much.

        Returns
        -------
        maps : ndarray of shape (n, H, W), float32, or list of ndarray of shape (H, W)
            Of the images' own size, a list when they differ in size; of the features' grid with ``backbone=None``.
            Higher is more anomalous; one scale for all images: 0 is typical, values over ``map_threshold_``
            occur anywhere in a normal image with a probability of about ``false_alarm_rate``.
        """
        check_is_fitted(self)
        data = self._check_X(X)
        out = []
        for start in range(0, len(data), self.batch_size):
            rows = np.arange(start, min(start + self.batch_size, len(data)))
            maps = self._judge_data(data, rows).maps
            out.extend(_resize(m, data.size(i)) for i, m in zip(rows, maps))
        same = len({m.shape for m in out}) == 1
        return np.stack(out) if same else out

    def _offset_of(self, category):
        return self.offset_ if np.isscalar(self.offset_) else self.offset_[category]

    def _judge(self, X) -> Judgement:
        check_is_fitted(self)
        data = self._check_X(X)
        return self._judge_data(data, np.arange(len(data)), keep_maps=False)

    def _judge_data(self, data, rows, keep_maps=True) -> Judgement:
        """One pass over some images, chunk by chunk."""
        device = pick_device(self.device)
        parts = []
        model = self.model_.to(device)
        try:
            for _, maps in self._iter_features(data, device, rows):
                category, excess = self._route(describe(maps))
                terms = self._model_terms(model, maps, category, device)
                combined = self.map_calibration_.combine(terms, category)
                score = self._image_score(combined, category, excess)
                parts.append((score, category, combined if keep_maps else combined[:0]))
        finally:
            model.to("cpu")
        return Judgement(*(np.concatenate(column) for column in zip(*parts)))

    def _image_score(self, maps, category, excess) -> np.ndarray:
        score = self.score_calibration_.transform(pool_map(maps, self._pool_fraction), category)
        return score + FAR_WEIGHT * excess

    def _route(self, descriptor) -> tuple[np.ndarray, np.ndarray]:
        """Category of each image, and by how many limits it is too far from it."""
        category, distance = self.router_.predict(descriptor)
        return category, np.maximum(0.0, distance / self._distance_limit[category] - 1.0)

    def _model_terms(self, model: nn.Module, maps: list[Tensor], category, device) -> dict[str, np.ndarray]:
        """The model's map terms of one chunk.

        One category at a time, filled up to a fixed number of images, in one layout: the last bits of a matrix
        product depend on its size and strides, and which products are formed on the categories.
        """
        size = chunk_size(device, math.prod(maps[-1].shape[-2:]))
        maps = [(m.to(device).float() - a.to(device)) / b.to(device)
                for m, a, b in zip(maps, self.feature_mean_, self.feature_scale_)]  # fmt: skip
        dtype = native_precision(device, self.precision)
        out: dict[str, np.ndarray] = {}
        for c in np.unique(category):
            for part in torch.from_numpy(np.flatnonzero(category == c)).split(size):
                chunk = [
                    pad_chunk(m[part.to(device)], size).contiguous(memory_format=torch.channels_last) for m in maps
                ]
                number = torch.full((size,), int(c), device=device)
                with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    terms = self._map_terms(model, chunk[0] if len(chunk) == 1 else chunk, number)
                for name, term in terms.items():
                    rows = out.setdefault(name, np.empty((len(category), *term.shape[1:]), np.float32))
                    rows[part.numpy()] = term[: len(part)].float().cpu().numpy()
        return out

    def _map_terms(self, model: nn.Module, features, category: Tensor) -> dict[str, Tensor]:
        """Terms of the anomaly map, all (n, h, w) on one grid; a detector says which."""
        return model.anomaly_map(features, category)

    def _store_terms(self, store, rows, category, device) -> dict[str, np.ndarray]:
        """Map terms of stored images."""
        parts = []
        size = chunk_size(device, math.prod(store.maps[-1].shape[-2:]))
        model = self.model_.to(device)
        try:
            for start in range(0, len(rows), size):
                part = slice(start, start + size)
                maps = store.batch(rows[part])
                maps = to_device([maps] if isinstance(maps, Tensor) else maps, device)
                parts.append(self._model_terms(model, maps, category[part], device))
        finally:
            model.to("cpu")
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    # ---------------------------------------------------------------- images and features

    def _check_X(self, X, reset=False):
        """Images or features, checked, as something with a length, sizes and chunks."""
        if self.backbone is None:
            return check_features(self, X, reset)
        if isinstance(X, np.ndarray) and X.ndim == 2 and self.image_shape is not None:
            X = validate_data(self, X, reset=reset, ensure_all_finite=False, dtype=None)
        return check_images(X, image_shape=None if self.image_shape is None else tuple(self.image_shape))

    def _extract(self, data, rows, device) -> tuple[FeatureStore, np.ndarray]:
        """Features and descriptors of the images ``rows``: each image passes the backbone once."""
        if self.backbone is not None:
            self.features_ = self._make_features(data, rows)
        # What came as features stays as precise as it came.
        dtype = torch.float32 if isinstance(data, FeatureArray) else native_precision(device, self.precision)
        store = FeatureStore(len(rows), dtype)
        descriptor, done = [], 0
        bar = tqdm(total=len(rows), desc="features", unit="image", disable=not self.verbose)
        for _, maps in self._iter_features(data, device, rows):
            n = len(maps[0])
            bar.update(n)
            store.write(np.arange(done, done + n), maps)
            descriptor.append(describe(maps))
            done += n
        bar.close()
        return store, np.concatenate(descriptor)

    def _make_features(self, data, rows):
        if isinstance(self.backbone, str):
            return BackboneFeatures(
                self.backbone, weights=self.weights, image_size=self.image_size,
                device=self.device, precision=self.precision, **self._feature_options(),
            ).fit()  # fmt: skip
        merge = self._feature_options().get("merge", True)
        if isinstance(self.backbone, BackboneFeatures) and self.backbone.merge != merge:
            raise ValueError(f"{type(self).__name__} takes a BackboneFeatures with merge={merge}.")
        self._map_shape = None
        try:
            check_is_fitted(self.backbone)
        except NotFittedError:
            return clone(self.backbone).fit(_Pixels(data, rows))
        return self.backbone

    def _iter_features(self, data, device, rows=None) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
        rows = np.arange(len(data)) if rows is None else rows
        if isinstance(data, FeatureArray):
            yield from data.chunks(rows, device)
        elif isinstance(self.features_, BackboneFeatures):
            yield from self.features_.iter_maps(data, rows)
        else:
            for row in rows:
                maps = np.asarray(self.features_.transform([data.pixels(row)]), dtype=np.float32)
                self._check_map(maps, data.name(row))
                yield np.array([row]), [torch.from_numpy(maps).permute(0, 3, 1, 2).to(device)]

    def _check_map(self, maps: np.ndarray, name: str) -> None:
        """Check what a caller's own backbone made of one image: the same shape as of the first image."""
        what = f"backbone {type(self.features_).__name__} gave features of shape {maps.shape} for {name}"
        if maps.ndim != 4 or len(maps) != 1:
            raise ValueError(f"{what}, where maps of shape (n, h, w, C) are expected, here with n = 1.")
        if not np.isfinite(maps).all():
            raise ValueError(f"{what} with NaN or infinite values.")
        if self._map_shape is None:
            self._map_shape = maps.shape
        elif maps.shape != self._map_shape:
            raise ValueError(f"{what}, but {self._map_shape} for others: it must bring images to one size.")

    def __sklearn_is_fitted__(self):
        return hasattr(self, "map_threshold_")

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        is_table = self.backbone is None or self.image_shape is not None
        tags.input_tags.two_d_array = is_table
        tags.input_tags.three_d_array = not is_table
        tags.non_deterministic = False
        return tags


class _Pixels:
    """Images as a caller's own backbone is fitted on them: read when they are asked for."""

    def __init__(self, data, rows):
        self.data, self.rows = data, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.data.pixels(self.rows[i])


def _resize(grid_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if grid_map.shape == tuple(size):
        return grid_map
    tensor = torch.from_numpy(grid_map)[None, None]
    return F.interpolate(tensor, tuple(size), mode="bilinear", align_corners=True)[0, 0].numpy()
