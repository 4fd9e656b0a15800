"""The estimator contract, written once: everything that a detector does but its model."""

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
from vqad.backbones import DEFAULT_BACKBONE, backbone_strides, spread_stages
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

# A view of this share of the image's side is what the coarsest stage sees (docs/choices.md).
DEEP_VIEW = 7 / 9
# Parameters that a trained model does not depend on, or only by its features, which a checkpoint knows otherwise.
NOT_OF_THE_TRAINING = {
    "backbone", "weights", "image_size", "image_shape", "ignore", "contamination", "false_alarm_rate", "threshold",
    "warm_start", "checkpoint_dir", "device", "precision", "n_jobs", "memory", "random_state", "verbose",
}  # fmt: skip


class BaseImageDetector(Deciding, Judging, OutlierMixin, BaseEstimator):
    """Base of the detectors: images in, frozen features, routing, training, calibration, scores.

    A detector adds its parameters, ``model_class``, an `AnomalyModel`, and two hooks: ``_stages(strides)`` says which
    stages of the backbone it wants, and whether the coarsest may come from a smaller view of the image;
    ``_model_config(shape, n_categories, n_added)`` gives the arguments of the model for maps of a `FeatureShape`, where
    the last ``n_added`` categories were added by `partial_fit`. What it has learned is in ``fitted_``, which is
    replaced as a whole.
    """

    _parameter_constraints: dict = {
        "backbone": [str, HasMethods(["fit", "transform"]), None],
        "weights": [str, Path, None],
        "image_size": [Interval(Integral, 1, None, closed="left"), tuple, list],
        "image_shape": [tuple, list, None],
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
        """Those of the base too, so that a detector may hand on what it takes as ``**shared``."""
        return sorted({*super()._get_param_names(), *signature(BaseImageDetector.__init__).parameters} - {"self"})

    # ---------------------------------------------------------------- fitting

    def fit(self, X, y=None, *, category=None, groups=None):
        """Learn what normal looks like.

        Parameters
        ----------
        X : images, or features with ``backbone=None``
            Array (n, H, W) or (n, H, W, C), list of images, file paths, or a `vqad.datasets` collection.
        y : None or array-like of shape (n,) of +1 / -1, default=None
            Images labelled -1 are left out. Other values are ignored, with a warning. When left out, the ``target``
            of a `vqad.datasets` collection counts.
        category : array-like of shape (n,) of str or int, default=None
            The kind of object on each image. Discovered when left out. Never needed again.
        groups : array-like of shape (n,), default=None
            Which images belong together, such as several pictures of one piece: any labels that hash. Thresholds then
            hold for new groups: ``calibration_fraction`` is a share of the groups of each category, and of each that is
            held out one image counts. Where categories are discovered a group is taken to be of one. When left out,
            every image stands for itself.

        Returns
        -------
        self : object
            As it was before if the call fails. Until it ends, other threads that score have what was fitted before.

        Raises
        ------
        KeyboardInterrupt
            When interrupted before the end of the first pass, or after the last one. In between an interrupt ends the
            training early: what was learned so far stays, with a warning.
        ValueError
            When X has the wrong form, an image cannot be read or a parameter is out of its range.
        FileNotFoundError
            When the backbone's weights are not on this machine.
        """
        self._validate_params()
        before = self._fitted if self.warm_start and self.__sklearn_is_fitted__() else None
        now = self._as_it_is(fresh=before is None)
        data, rows, category, groups = now._check_images(X, y, category, groups, before)
        if len(rows) == 1:
            raise ValueError(
                "At least 2 normal images are needed, one to learn from and one to set the threshold; got n_samples=1."
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
        """Go on learning, with more images of known categories or with categories that were never seen.

        What the model has for each category alone is trained: of a new category for ``max_iter`` passes, of a known
        one for one. In HVQ-Trans these are codes and a last layer; in VQ-Flow codes and a short flow behind the shared
        ones, which only categories have that were added here (of those that `fit` learned together, only the scale of
        scores and thresholds go on learning). Held-out images set the scale of a new category's scores; of a known one
        they join the ones of before. All that the categories share stays as it is: while an image is judged as a
        category that gets no image here, its score does not change by a bit. It is judged as another if it is nearer to
        a new one, as with one kind under two names. ``map_threshold_`` changes, and ``offset_`` and p-values where all
        categories share one threshold.

        The first call is `fit`. It sets the scale of the features for good, so give it what is typical.

        Parameters
        ----------
        X : images, or features with ``backbone=None``
            Only the new ones; those seen before are not needed.
        y : None or array-like of shape (n,) of +1 / -1, default=None
            As for `fit`.
        category : array-like of shape (n,) of str or int, default=None
            Known or new labels, of the type that the detector has. When left out, each image is taken for the category
            that it is nearest to, and images too far from all of them make new categories, if they are five or more.
        groups : array-like of shape (n,), default=None
            As for `fit`, of the images of this call: a group that `fit` has seen should not come again.

        Returns
        -------
        self : object
            As it was before if the call fails. Until it ends, other threads that score have what was fitted before.

        Raises
        ------
        KeyboardInterrupt
            When interrupted, as by `fit`, of which known categories have one pass only.
        ValueError
            When X has the wrong form, an image cannot be read or labels are of another type.
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

        Returns
        -------
        label : ndarray of shape (n,), int
        """
        return self.fit(X, y, category=category, groups=groups).predict(X)

    # ---------------------------------------------------------------- what the functions below are given

    def _draw_seed(self) -> int:
        return agreed(int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max)))

    def _take(self, learner, fitted) -> None:
        """Have what was learned, all at once: another thread sees all of it or nothing."""
        form = {name: vars(learner)[name] for name in FORM_OF_X if name in vars(learner)}
        kept = {name: value for name, value in vars(self).copy().items() if name not in FORM_OF_X}
        self.__dict__ = {**kept, **form, "_fitted": fitted}

    def _ignore(self):
        """The mask of what is not looked at of any image, checked; None if there is none."""
        if self.ignore is not None and self.backbone is None:
            raise ValueError("ignore= is a mask of images, and backbone=None takes features: leave them out of these.")
        return None if self.ignore is None else as_mask(self.ignore, "ignore")

    def _tiles(self):
        """Size and overlap of tiles, checked; None where images are seen as a whole."""
        if self.tiles is not None and self.backbone is None:
            raise ValueError("tiles= cuts images, and backbone=None takes features: cut before these are made.")
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
        """Of `BackboneFeatures`, for a timm model."""
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
        """Images, which rows of them are normal, and of these the categories and groups, if given; all checked."""
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
