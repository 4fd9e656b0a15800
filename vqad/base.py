"""The estimator contract of all detectors: everything except the model."""

from __future__ import annotations

from dataclasses import fields
from inspect import signature
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions

from vqad import extending, fitting
from vqad._checks import check_category, check_groups, check_range, normal_rows
from vqad._ignore import as_mask
from vqad.backbones import DEFAULT_BACKBONE, backbone_strides, check_stages, spread_stages
from vqad.collective import agreed
from vqad.datasets import ImageDataset
from vqad.deciding import Deciding
from vqad.engine import Engine, learning
from vqad.features import check_image_size, fit_features
from vqad.judging import FORM_OF_X, Judging
from vqad.nn.draws import drawing
from vqad.splitting import of_rows
from vqad.store import FeatureArray
from vqad.tiling import Tiling
from vqad.training_run import TrainingPlan

# Size of the view that the coarsest stage sees, as a share of image_size (docs/choices.md).
DEEP_VIEW = 7 / 9
# Parameters that a trained model does not depend on, or depends on only through its features, whose digest is part of
# a checkpoint's name.
NOT_OF_THE_TRAINING = {
    "backbone", "weights", "image_size", "image_shape", "ignore", "contamination", "false_alarm_rate", "threshold",
    "warm_start", "checkpoint_dir", "device", "precision", "n_jobs", "memory", "random_state", "verbose",
}  # fmt: skip


class BaseImageDetector(Deciding, Judging, OutlierMixin, BaseEstimator):
    """Base class of the detectors: feature extraction, routing, training, calibration and scoring.

    A detector adds its parameters, ``model_class``, an `AnomalyModel`, and two hooks. ``_stages(strides)`` returns the
    stages of the backbone that it uses, and whether the coarsest may come from a smaller view of the image.
    ``_model_config(shape, n_categories, n_added)`` returns the arguments of the model for maps of a `FeatureShape`; the
    last ``n_added`` categories were added by `partial_fit`. The learned state is ``fitted_``, which is replaced as a
    whole.
    """

    _parameter_constraints: dict = {
        "backbone": [str, HasMethods(["fit", "transform"]), None],
        "weights": [str, Path, None],
        "image_size": [Interval(Integral, 1, None, closed="left"), tuple, list],
        "image_shape": [tuple, list, None],
        "stages": [tuple, list, None],
        "ignore": ["array-like", str, Path, None],
        "tiles": [Integral, tuple, list, None],
        "standardize": ["boolean"],
        "gaussian": ["boolean"],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "schedule": [StrOptions({"cosine", "constant", "step"})],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "category_balance": [Interval(Real, 0, 1, closed="both")],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "warm_start": ["boolean"],
        "checkpoint_dir": [str, Path, None],
        "contamination": [StrOptions({"auto"}), Interval(Real, 0, 0.5, closed="right")],
        "false_alarm_rate": [Interval(Real, 0, 1, closed="neither")],
        "calibration_fraction": [Interval(Real, 0, 1, closed="neither")],
        "threshold": [StrOptions({"global", "category"})],
        "device": [str, torch.device],
        "precision": [StrOptions({"auto", "float32", "bfloat16"})],
        "n_jobs": [Integral, None],
        "memory": [str, Path, HasMethods(["cache"]), None],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self, *,
        backbone=DEFAULT_BACKBONE, weights=None, image_size=288, image_shape=None, ignore=None, tiles=None,
        standardize=True, gaussian=True, max_iter=5, batch_size=16, learning_rate=1e-3, schedule="cosine",
        weight_decay=1e-4, category_balance=0.5, early_stopping=False, validation_fraction=0.1, n_iter_no_change=10,
        tol=1e-4, warm_start=False, checkpoint_dir=None, contamination="auto", false_alarm_rate=0.05,
        calibration_fraction=0.2, threshold="global", device="auto", precision="auto", n_jobs=None, memory=None,
        random_state=None, verbose=0,
    ):  # fmt: skip
        self.backbone = backbone
        self.weights = weights
        self.image_size = image_size
        self.image_shape = image_shape
        self.ignore = ignore
        self.tiles = tiles
        self.standardize = standardize
        self.gaussian = gaussian
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.schedule = schedule
        self.weight_decay = weight_decay
        self.category_balance = category_balance
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.warm_start = warm_start
        self.checkpoint_dir = checkpoint_dir
        self.contamination = contamination
        self.false_alarm_rate = false_alarm_rate
        self.calibration_fraction = calibration_fraction
        self.threshold = threshold
        self.device = device
        self.precision = precision
        self.n_jobs = n_jobs
        self.memory = memory
        self.random_state = random_state
        self.verbose = verbose

    @classmethod
    def _get_param_names(cls):
        """Include the base's parameters, so that a detector may pass them on as ``**shared``."""
        return sorted({*super()._get_param_names(), *signature(BaseImageDetector.__init__).parameters} - {"self"})

    # ---------------------------------------------------------------- fitting

    def fit(self, X, y=None, *, category=None, groups=None):
        """Learn what normal looks like.

        Parameters
        ----------
        X : images, or features with ``backbone=None``
            Array (n, H, W) or (n, H, W, C), list of images, file paths, or a `vqad.datasets` collection.
        y : None or array-like of shape (n,) of +1 / -1, default=None
            Images labelled -1 are left out. If y has other values it is ignored, with a warning. None uses the
            ``target`` of a `vqad.datasets` collection, if X is one.
        category : array-like of shape (n,) of str or int, default=None
            Kind of object in each image; discovered if None. Scoring never needs it.
        groups : array-like of shape (n,), default=None
            Which images belong together, such as several pictures of one piece: any hashable labels. Thresholds then
            hold for new groups: ``calibration_fraction`` is a share of the groups of each category, and one image of
            each held-out group is used. If categories are discovered, all images of a group get the same one. None:
            every image is a group of its own.

        Returns
        -------
        self : object
            Unchanged if the call fails. Until it returns, other threads score with the previous state.

        Raises
        ------
        KeyboardInterrupt
            When interrupted before the end of the first pass, or after the last one. In between, an interrupt ends the
            training early, with a warning, and what was learned so far is kept.
        ValueError
            When X has the wrong form, an image cannot be read or a parameter is out of range.
        FileNotFoundError
            When the backbone's weights are not on this machine.
        """
        self._validate_params()
        before = self._fitted if self.warm_start and self.__sklearn_is_fitted__() else None
        now = self._snapshot(fresh=before is None)
        data, rows, category, groups = now._check_images(X, y, category, groups, before)
        if len(rows) == 1:
            raise ValueError(
                "At least 2 normal images are needed, one to train on and one to set the threshold; got n_samples=1."
            )
        engine, settings = Engine.pick(self.device, self.precision), now._settings(data)
        fitting.check_labels(category, groups, settings, before, warm=before is not None)
        seed = self._draw_seed()
        features, map_shape, ignore, tiles = None, None, self._ignore(), self._tiles()
        if before is not None:
            features, map_shape, ignore, tiles = before.features, before.map_shape, before.ignore, before.tiles
        elif self.backbone is not None:
            with learning(seed, engine.device), drawing():
                known = data if ignore is None else data.ignoring(ignore)
                features = fit_features(self.backbone, known, rows, **self._feature_options())
        source = self._map_source(data, features, engine, map_shape, ignore, tiles)
        images = fitting.Images(source, rows, category, groups)
        self._take(now, fitting.fit(images, settings, seed, before))
        return self

    def partial_fit(self, X, y=None, *, category=None, groups=None):
        """Learn more images of known categories, or new categories.

        Only the parts of the model that belong to a single category are trained: ``max_iter`` passes for a new
        category, one pass for a known one. In HVQ-Trans these are codes and an output layer. In VQ-Flow they are codes
        and a short flow after the shared ones, which only categories added by this method have; for the categories that
        `fit` learned together, only distance limits and thresholds are updated. Held-out images set the scale of a new
        category's scores; those of a known category are added to its earlier ones.

        Everything that categories share stays fixed. As long as an image is judged as a category that gets no images
        here, its score stays the same to the last bit. It may be judged as another category if a new one is nearer.
        ``map_threshold_`` changes, and so do ``offset_`` and p-values if all categories share one threshold.

        The first call is the same as `fit`. It fixes the scale of the features, so pass typical images.

        Parameters
        ----------
        X : images, or features with ``backbone=None``
            Only the new ones; earlier images are not needed.
        y : None or array-like of shape (n,) of +1 / -1, default=None
            As for `fit`.
        category : array-like of shape (n,) of str or int, default=None
            Known or new labels, of the same type as ``categories_``. If None, each image is assigned to the nearest
            category; images that are too far from all of them form new categories if there are at least five.
        groups : array-like of shape (n,), default=None
            As for `fit`, for the images of this call. Groups seen by an earlier call should not be split over calls.

        Returns
        -------
        self : object
            Unchanged if the call fails. Until it returns, other threads score with the previous state.

        Raises
        ------
        KeyboardInterrupt
            As by `fit`; known categories have one pass only.
        ValueError
            When X has the wrong form, an image cannot be read or labels have another type.
        """
        if not self.__sklearn_is_fitted__():
            return self.fit(X, y, category=category, groups=groups)
        self._validate_params()
        now = self._now()
        before = now._fitted
        data, rows, category, groups = now._check_images(X, y, category, groups, before)
        settings = now._settings(data)
        fitting.check_labels(category, groups, settings, before, warm=False)
        source = now._source_of(data)
        images = fitting.Images(source, rows, category, groups)
        self._take(now, extending.extend(images, settings, self._draw_seed(), before))
        return self

    def fit_predict(self, X, y=None, *, category=None, groups=None):
        """Fit, then label the same images: +1 normal, -1 anomaly.

        Parameters
        ----------
        X, y, category, groups
            As for `fit`.

        Returns
        -------
        label : ndarray of shape (n,), int
        """
        return self.fit(X, y, category=category, groups=groups).predict(X)

    # ---------------------------------------------------------------- arguments of the functions that learn

    def _validate_params(self):
        super()._validate_params()
        check_stages(getattr(self, "stages", None))

    def _draw_seed(self) -> int:
        return agreed(int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max)))

    def _take(self, learner, fitted) -> None:
        """Replace the learned state in one step: another thread sees all of it or none."""
        form = {name: vars(learner)[name] for name in FORM_OF_X if name in vars(learner)}
        kept = {name: value for name, value in vars(self).copy().items() if name not in FORM_OF_X}
        self.__dict__ = {**kept, **form, "_fitted": fitted}

    def _ignore(self):
        """The mask of what to ignore in every image, checked; None if there is none."""
        if self.ignore is not None and self.backbone is None:
            raise ValueError("ignore= is a mask for images, but with backbone=None X holds features: set ignore=None.")
        return None if self.ignore is None else as_mask(self.ignore, "ignore")

    def _tiles(self):
        """Size and overlap of tiles, checked; None if images are not cut."""
        if self.tiles is not None and self.backbone is None:
            raise ValueError("tiles= cuts images, but with backbone=None X holds features: set tiles=None.")
        return None if self.tiles is None else tuple(Tiling.of(self.tiles))

    def _settings(self, data) -> fitting.Settings:
        parameters = self.get_params(deep=False)
        training = {name: value for name, value in parameters.items() if name not in NOT_OF_THE_TRAINING}
        named = {each.name for each in fields(fitting.Settings)} & set(parameters)
        return fitting.Settings(
            make_model=lambda *shape: self.model_class(**self._model_config(*shape)),
            plan=TrainingPlan(**{each.name: parameters[each.name] for each in fields(TrainingPlan) if
                                 each.name in parameters}),
            training={**training, "detector": type(self).__name__},
            is_seeded=self.random_state is not None,
            map_shape=data.values.shape[1:] if isinstance(data, FeatureArray) else None,
            per_category=self.threshold == "category",
            **{name: parameters[name] for name in named},
        )  # fmt: skip

    def _feature_options(self) -> dict:
        """Arguments of `BackboneFeatures`; empty if the backbone is not a timm model."""
        if not isinstance(self.backbone, str):
            return {}
        strides = backbone_strides(self.backbone)
        stages, may_be_smaller = self._stages(strides)
        options = {
            "stages": stages, "weights": self.weights, "image_size": self.image_size, "device": self.device,
            "precision": self.precision,
        }  # fmt: skip
        if self.gaussian and may_be_smaller and spread_stages(strides) is None:
            side = strides[-1]
            size = (max(side, round(DEEP_VIEW * s / side) * side) for s in check_image_size(self.image_size))
            options["deep_size"] = tuple(max(32, s) for s in size)
        return options

    def _check_images(self, X, y, category, groups, before):
        """Check the arguments of `fit`: the images, the rows that are normal, and these rows' categories and groups."""
        data = self._check_X(X, before)
        y = X.target if y is None and isinstance(X, ImageDataset) else y
        rows = normal_rows(y, len(data))
        if isinstance(data, FeatureArray):
            check_range(data, rows)
        given = check_category(category, len(data)), check_groups(groups, len(data))
        return data, rows, *(of_rows(each, rows) for each in given)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        inputs, takes_images = tags.input_tags, self.backbone is not None
        inputs.two_d_array = not takes_images or self.image_shape is not None
        inputs.three_d_array = inputs.string = takes_images  # strings are paths
        inputs.positive_only = takes_images
        tags.non_deterministic = False
        return tags
