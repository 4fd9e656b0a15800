"""The estimator contract, written once: everything that a detector does but its model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from tqdm.auto import tqdm

from vqad._checks import (
    both_labels,
    check_category,
    check_features,
    check_groups,
    check_range,
    normal_rows,
    taken,
)
from vqad.backbones import backbone_strides, spread_stages
from vqad.chunks import chunk_size, in_chunks, joined, pad_chunk, side_by_side
from vqad.datasets import ImageDataset
from vqad.device import native_precision, on_device, pick_device, seeded
from vqad.explain import explain_images
from vqad.features import BackboneFeatures, check_image_size, fit_features, transformer_maps
from vqad.images import check_images
from vqad.learning import check_labels, learn_all, learn_more, open_checkpoint
from vqad.nn.fields import feature_fields
from vqad.prototypes import add_prototypes, learn_prototypes
from vqad.scoring import FAR_WEIGHT, Scorer, Term
from vqad.store import FeatureArray, FeatureStore, describe
from vqad.thresholds import labelled_offset, threshold_rule
from vqad.training import TrainingPlan

# An image this many times as far from its category as the farthest hundredth of normal images belongs to none.
FAR = 1.5
# The most distances that count: of features whose squares are no numbers, too.
FARTHEST = 1e9
# The largest value of a feature that a model or a Gaussian sees.
LARGEST = 1e12
# A view of this share of the image's side is what the coarsest stage sees (docs/choices.md).
DEEP_VIEW = 7 / 9


HALF = (torch.float16, torch.bfloat16)


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

    A detector adds its parameters and these hooks: ``_make_model(channels, shapes, n_categories)`` returns the
    module, with the methods ``loss``, ``anomaly_map`` and ``initialise_codes``; ``_clip_norm`` bounds its gradient;
    ``_stages_of(strides)`` says which stages of the backbone it wants; ``_arranged(maps)`` brings their maps to the
    form that the model takes; ``_model_fields(model, features, category)`` gives the vectors, or numbers, of every cell
    that say how anomalous it is, and ``_terms()`` how they count; ``_codebooks()`` names its codebooks, and
    ``_look_up(model, features, category)`` gives of each the code of every cell and its distance to it, (n, h, w) each.
    One whose model has parts that serve a single category says so in ``_add_categories`` and ``_parts_of``.
    """

    _parameter_constraints: dict = {
        "backbone": [str, HasMethods(["fit", "transform"]), None],
        "weights": [str, Path, None],
        "image_size": [Interval(Integral, 1, None, closed="left"), tuple, list],
        "image_shape": [tuple, list, None],
        "standardize": ["boolean"],
        "gaussian": ["boolean"],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
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
        warm = self.warm_start and self.__sklearn_is_fitted__()
        with self._learner() as learner:
            if not warm:  # what a fit on other images may not set
                for name in ("features_", "n_features_in_", "feature_names_in_", "map_shape_"):
                    vars(learner).pop(name, None)
                for name in ("_model_shapes", "scorer_"):  # what parameters decide anew
                    vars(learner).pop(name, None)
                learner._map_shape = None
            data, rows, category, groups = learner._check_images(X, y, category, groups, reset=not warm)
            if len(rows) == 1:
                raise ValueError(
                    "At least 2 normal images are needed, one to learn from and one to set the threshold; got "
                    "n_samples=1."
                )
            check_labels(learner, category, groups, "warm" if warm else "anew")
            learner._learn(data, rows, category, groups, warm)
        return self

    def _learn(self, data, rows, category, groups, warm) -> None:
        """Learn the images ``rows``, anew or ``warm``."""
        device, seed = pick_device(self.device), self._draw_seed()
        with seeded(seed, device):
            if self.backbone is not None and not warm:
                strides = backbone_strides(self.backbone) if isinstance(self.backbone, str) else None
                self.features_ = fit_features(
                    self.backbone, data, rows, taker=type(self).__name__, merged=self._takes_merged,
                    weights=self.weights, image_size=self.image_size, device=self.device, precision=self.precision,
                    **({} if strides is None else self._feature_options(strides)),
                )  # fmt: skip
            store, descriptor = self._extract(data, rows, device)
        checkpoint = open_checkpoint(self, store, category, groups, device, seed, warm)
        seed = seed if checkpoint is None else checkpoint.seed
        with seeded(seed, device):
            index = learn_all(self, store, descriptor, category, groups, device, seed, checkpoint, warm)
            self._prototypes = learn_prototypes(self, store, index, data, rows, device)
        if checkpoint is not None and self.random_state is None and not self.training_log_.interrupted:
            checkpoint.remove()  # the next fit is another one

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
        data, rows, category, groups = self._check_images(X, y, category, groups)
        check_labels(self, category, groups, "more")
        device, seed = pick_device(self.device), self._draw_seed()
        copied = "model_", "router_", "scorer_"
        with seeded(seed, device), self._learner(copied) as learner:
            store, descriptor = learner._extract(data, rows, device)
            index = learn_more(learner, store, descriptor, category, groups, device, seed)
            add_prototypes(learner, store, index, data, rows, device)
        return self

    def fit_predict(self, X, y=None, *, category=None, groups=None):
        """Fit, then label the same images: +1 normal, -1 anomaly.

        Returns
        -------
        label : ndarray of shape (n,), int
        """
        return self.fit(X, y, category=category, groups=groups).predict(X)

    def set_threshold(self, X, y, target="f1", *, recall=0.95, miss_cost=1.0, false_alarm_cost=1.0):
        """Set ``offset_`` by labelled images, where some defects are at hand.

        With ``threshold="category"`` each category gets its own, from the images that are judged as it; categories
        without both labels keep theirs. Scores, p-values and ``map_threshold_`` stay as they are. `fit` and
        `partial_fit` set ``offset_`` anew.

        Parameters
        ----------
        X : images, or features with ``backbone=None``
            None that `fit` has seen: those it trained on score too well.
        y : array-like of shape (n,) of +1 / -1
            +1 normal, -1 anomaly; both must occur.
        target : {"f1", "recall", "cost"}, default="f1"
            What the threshold is best for: the largest F1, anomalies being the positive class; the fewest false alarms
            with at least the share ``recall`` of the anomalies found; or the smallest total cost. Where several serve
            equally well it is the one with the fewest false alarms. It lies midway between two scores.
        recall : float in (0, 1], default=0.95
            Least share of the anomalies to find, of ``target="recall"``.
        miss_cost, false_alarm_cost : float, default=1.0
            What one missed anomaly and one false alarm cost, of ``target="cost"``.

        Returns
        -------
        self : object

        Raises
        ------
        NotFittedError
            When the detector is not fitted.
        ValueError
            When y has other values, only one of the two or the wrong length, or a parameter is out of its range.
        RuntimeError
            When meanwhile another thread fitted the detector.

        Warns
        -----
        UserWarning
            Of categories that keep their offset.

        Examples
        --------
        >>> import numpy as np
        >>> from vqad import HVQTransDetector
        >>> rng = np.random.default_rng(0)
        >>> good, bad = rng.normal(0, 1, (120, 8)), rng.normal(9, 1, (10, 8))
        >>> detector = HVQTransDetector(backbone=None, max_iter=1, false_alarm_rate=0.1, random_state=0)
        >>> detector = detector.fit(good[:80]).set_threshold(np.vstack([good[80:], bad]), np.repeat([1, -1], [40, 10]))
        >>> detector.predict(bad[:3])
        array([-1, -1, -1])
        """
        now = self._fitted()
        rule = threshold_rule(target, recall, miss_cost, false_alarm_cost)
        data = now._check_X(X)
        y = both_labels(y, len(data))
        judged = now._judge_data(data, np.arange(len(data)), keep_maps=False)
        offset = labelled_offset(now, -judged.score, judged.category, y, rule)
        if self.model_ is not now.model_:
            raise RuntimeError("Another thread's fit ended while the threshold was set: set it again.")
        self.offset_ = offset
        self._offset_from = f"{target} on {len(y)} labelled images"
        return self

    def _draw_seed(self) -> int:
        return int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))

    @contextmanager
    def _learner(self, copied=()) -> Iterator[BaseImageDetector]:
        """A second self that may learn, and gives this one what it has learned unless what is done inside fails.

        Other threads may go on scoring with this one: they must not see, nor disturb, what is being learned. So what is
        changed in place has to be ``copied``.
        """
        learner = self._as_it_is()
        before = vars(learner).copy()
        for name in copied:
            setattr(learner, name, copy.deepcopy(before[name]))
        yield learner
        after = vars(learner)
        new = {name: value for name, value in after.items() if name not in before or value is not before[name]}
        kept = {name: value for name, value in vars(self).copy().items() if name in after or name not in before}
        self.__dict__ = {**kept, **new}  # at once: another thread sees all of it or nothing

    def _as_it_is(self):
        """A second self with the same attributes, which another thread that learns more does not replace."""
        now = object.__new__(type(self))
        vars(now).update(vars(self))
        return now

    def _fitted(self):
        """`_as_it_is`, which all that needs a fitted detector works with; raises NotFittedError if it is not one."""
        now = self._as_it_is()
        check_is_fitted(now)
        return now

    def _plan(self) -> TrainingPlan:
        """All of its fields but one are parameters."""
        names = {each.name for each in fields(TrainingPlan)} - {"clip_norm"}
        return TrainingPlan(clip_norm=self._clip_norm, **{name: getattr(self, name) for name in names})

    def _note(self, log, add: bool) -> None:
        """Keep what happened in training; add it to what happened before."""
        self.loss_curve_ = (self.loss_curve_ if add else []) + log.loss_curve
        self.validation_curve_ = (self.validation_curve_ if add else []) + log.validation_curve
        self.training_log_, self.n_iter_ = log, len(self.loss_curve_)

    def _settle(self, batches) -> None:
        """What the model does with the images that it has learned, when it has; nothing."""

    def _add_categories(self, n: int, batches) -> None:
        """Make room in the model for ``n`` more categories, and start it from their batches; no model needs to."""

    def _code_groups(self, category: np.ndarray) -> np.ndarray:
        """Which group of the codes each image uses, of its category's number: by default one group a category."""
        return category

    def _parts_of(self, categories: list[int]) -> list[nn.Module]:
        """Parts of the model that serve these categories and no others: what `partial_fit` trains."""
        return []

    def _initialise(self, batches) -> None:
        """Start the model's codes from data."""
        self.model_.initialise_codes(batches)

    def _far_limits(self, descriptor, index) -> np.ndarray:
        """Distance from its nearest category's mean beyond which an image belongs to no category."""
        _, distance = self.router_.predict(descriptor)
        limits = np.full(len(self.categories_), np.inf)
        for c, n in zip(*np.unique(index, return_counts=True)):
            if n > 1:
                # New images lie farther from the mean than those n that it is the mean of.
                widened = math.sqrt((n + 1) / (n - 1))
                limits[c] = FAR * widened * np.quantile(distance[index == c], 0.99) + 1e-9
        return limits

    # ---------------------------------------------------------------- scoring

    def score_samples(self, X):
        """How normal each image is.

        Returns
        -------
        score : ndarray of shape (n,), float64
            Higher is more normal. 0 is the typical normal image of any category; the unit is a standard
            deviation of normal images.
        """
        return -self._fitted()._judge(X).score

    def decision_function(self, X):
        """``score_samples(X) - offset_``: negative for anomalies.

        Returns
        -------
        decision : ndarray of shape (n,), float64
        """
        now = self._fitted()
        judged = now._judge(X)
        return -judged.score - now._offset_of(judged.category)

    def predict(self, X):
        """+1 for normal images, -1 for anomalies.

        Returns
        -------
        label : ndarray of shape (n,), int
        """
        return np.where(self.decision_function(X) >= 0, 1, -1)

    def p_values(self, X):
        """Conformal p-value of "this image is normal", from held-out normal images.

        Returns
        -------
        p : ndarray of shape (n,), float64
            In (0, 1]. Of normal images at most a share of alpha has a p-value of alpha or less.
        """
        now = self._fitted()
        judged = now._judge(X)
        return now.conformal_.p_values(judged.score, judged.category)

    def predict_category(self, X):
        """Which category each image was judged as.

        Returns
        -------
        category : ndarray of shape (n,)
            Labels as given to fit, or numbers where the categories were discovered.
        """
        now = self._fitted()
        data = now._check_X(X)
        device = pick_device(now.device)

        def route(part: np.ndarray) -> list[np.ndarray]:
            return [now._route(describe(maps))[0] for _, maps in now._iter_features(data, device, part)]

        routed = now._side_by_side(route, data, np.arange(len(data)), device)
        return now.categories_[np.concatenate(list(routed))]

    def anomaly_map(self, X):
        """Where each image is anomalous, and how much.

        All maps are in memory, four bytes a pixel: of many large photographs ask for some at a time.

        Returns
        -------
        maps : ndarray of shape (n, H, W), float32, or list of ndarray of shape (H, W)
            Of the images' own size, a list when they differ in size; of the features' grid with ``backbone=None``.
            Higher is more anomalous; one scale for all images: 0 is typical, values over ``map_threshold_``
            occur anywhere in a normal image with a probability of about ``false_alarm_rate``.
        """
        now = self._fitted()
        data = now._check_X(X)
        maps = now._judge_data(data, np.arange(len(data))).maps
        sizes = [data.size(i) for i in range(len(data))]
        resized = (resize_map(*pair) for pair in zip(maps, sizes))
        if len(set(sizes)) > 1:
            return list(resized)
        out = np.empty((len(maps), *sizes[0]), dtype=np.float32)
        for whole, m in zip(out, resized):
            whole[:] = m
        return out

    def explain(self, X):
        """What each image's map is made of: codes, distances and terms of every cell.

        Returns
        -------
        explanations : list of vqad.explain.Explanation
            One an image. ``prototypes_.of(explanation, codebook)`` is the normal patch that its worst cell was turned
            into.
        """
        now = self._fitted()
        return explain_images(now, now._check_X(X))

    @property
    def prototypes_(self):
        """Of every code the nearest patch of the normal images; see `vqad.prototypes.Prototypes`."""
        return self._fitted()._prototypes

    def _offset_of(self, category):
        return self.offset_ if np.isscalar(self.offset_) else self.offset_[category]

    def _judge(self, X) -> Judgement:
        data = self._check_X(X)
        return self._judge_data(data, np.arange(len(data)), keep_maps=False)

    def _judge_data(self, data, rows, keep_maps=True, note=None) -> Judgement:
        """One pass over some images, chunk by chunk; ``note`` is told what is known of each chunk."""
        device = pick_device(self.device)

        def judge(part: np.ndarray) -> list[tuple[np.ndarray, ...]]:
            judged = []
            chunks = ((chunk, describe(maps), maps) for chunk, maps in self._iter_features(data, device, part))
            for chunk, descriptor, maps in joined(chunks):
                category, excess = self._route(descriptor)
                found = self._model_terms(model, maps, category, device, self._judged)
                score = found["score"] + FAR_WEIGHT * excess
                if note is not None:
                    note(model, chunk, maps, category, excess, score)
                judged.append((score, category, found["map"] if keep_maps else found["map"][:0].copy()))
            return judged

        with on_device(self.model_, device) as model, on_device(self.scorer_, device):
            model = self._scoring_model(model, native_precision(device, self.precision))
            parts = list(self._side_by_side(judge, data, rows, device))
        return Judgement(*(np.concatenate(column) for column in zip(*parts)))

    def _route(self, descriptor) -> tuple[np.ndarray, np.ndarray]:
        """Category of each image, and by how many limits it is too far from it."""
        category, distance = self.router_.predict(descriptor)
        excess = np.maximum(0.0, distance / self._distance_limit[category] - 1.0)
        return category, np.nan_to_num(excess, nan=FARTHEST).clip(max=FARTHEST)

    def _model_terms(self, model: nn.Module, maps: list[Tensor], category, device, compute) -> dict[str, np.ndarray]:
        """What ``compute(model, maps, category)`` gives of one chunk.

        One category at a time, filled up to a fixed number of images, in one layout: the last bits of a matrix
        product depend on its size and strides, and which products are formed on the categories.
        """
        size = chunk_size(device, math.prod(maps[-1].shape[-2:]))
        dtype = native_precision(device, self.precision)
        out: dict[str, np.ndarray] = {}

        def judge(part: Tensor, size: int) -> dict[str, Tensor]:
            rows = part.to(maps[0].device)
            chunk = [pad_chunk(m[rows], size).to(device).float().clamp(-LARGEST, LARGEST) for m in maps]
            chunk = [m.contiguous(memory_format=torch.channels_last) for m in chunk]
            number = torch.full((size,), int(category[part[0]]), device=device)
            with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return compute(model, chunk, number)

        for c in np.unique(category):
            for part, terms in in_chunks(judge, torch.from_numpy(np.flatnonzero(category == c)), size):
                for name, term in terms.items():
                    values = (term.float() if term.dtype in HALF else term)[: len(part)].cpu().numpy()
                    kept = out.setdefault(name, np.empty((len(category), *values.shape[1:]), values.dtype))
                    kept[part.numpy()] = values
        return out

    def _assembled(self, maps: list[Tensor]) -> Tensor | list[Tensor]:
        """Maps in the form that the model takes, float32, each channel scaled."""
        return self._arranged(self._scaled(maps))

    def _scaled(self, maps: list[Tensor]) -> list[Tensor]:
        moments = zip(maps, self.feature_mean_, self.feature_scale_)
        return [((m - mean.to(m.device)) / scale.to(m.device)).clamp_(-LARGEST, LARGEST) for m, mean, scale in moments]

    def _fields(self, model: nn.Module, maps: list[Tensor], category: Tensor) -> dict[str, Tensor]:
        """What the scorer measures: the model's fields, and with ``gaussian`` those of the features themselves."""
        fields = self._model_fields(model, self._assembled(maps), category)
        if not self._has_gaussians:
            return fields
        if self.backbone is None:  # numbers of any unit
            maps = self._scaled(maps)
        strides = self.features_.strides_ if isinstance(getattr(self, "features_", None), BackboneFeatures) else None
        return {**feature_fields(maps, strides), **fields}

    @property
    def _has_gaussians(self) -> bool:
        """The parameter ``gaussian`` as it was at `fit`."""
        scorer = getattr(self, "scorer_", None)
        return self.gaussian if scorer is None else bool(scorer.measures)

    def _judged(self, model: nn.Module, maps: list[Tensor], category: Tensor) -> dict[str, Tensor]:
        """Score and map."""
        judged = self.scorer_(self._fields(model, maps, category), category[0])
        return {"score": judged.score, "map": judged.map}

    def _make_scorer(self, shapes: dict[str, tuple[int, int, int]], n_categories: int) -> Scorer:
        """A scorer of fields of these shapes that has learned nothing."""
        terms, map_peak = self._terms()
        return Scorer([t for t in terms if t.name in shapes], shapes, n_categories, map_peak)

    def _feature_terms(self) -> list[Term]:
        """How the fields of the features count."""
        return [
            Term("features", 1.0, (0.0,)),
            Term("fine", 1.0, (0.0,)),
            Term("middle", 1.0, (0.0,)),
            Term("deep", 0.0, (0.0, 0.3)),
            Term("whole", 0.0, (0.0,)),
        ]

    def _feature_options(self, strides) -> dict:
        """Of `BackboneFeatures`, for a network with these strides."""
        stages = self._stages_of(strides)
        if not self.gaussian or spread_stages(strides) is not None:
            return {"stages": stages}
        side = strides[-1]
        size = (max(side, round(DEEP_VIEW * s / side) * side) for s in check_image_size(self.image_size))
        return {"stages": stages, "deep_size": tuple(max(32, s) for s in size)}

    def _scoring_model(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """What gives the same fields as the model for less, in a pass over many images."""
        return model

    def _store_terms(self, store, rows, category, device, compute) -> dict[str, np.ndarray]:
        """What ``compute(model, maps, category)`` gives of stored images."""
        order = np.argsort(category, kind="stable")  # a chunk is of one category, and filled up
        size = chunk_size(device, math.prod(store.maps[-1].shape[-2:]))

        def terms_of(places: np.ndarray) -> list[dict[str, np.ndarray]]:
            out = []
            for part in np.split(places, range(size, len(places), size)):
                part = order[part]
                maps = [m.to(device, non_blocking=True) for m in store.batch(rows[part])]
                out.append(self._model_terms(model, maps, category[part], device, compute))
            return out

        with on_device(self.model_, device) as model, ExitStack() as stack:
            if self.scorer_ is not None:
                stack.enter_context(on_device(self.scorer_, device))
            model = self._scoring_model(model, native_precision(device, self.precision))
            parts = list(side_by_side(terms_of, np.arange(len(rows)), device, chunk=size))
        place = np.argsort(order)
        return {name: np.concatenate([p[name] for p in parts])[place] for name in parts[0]}

    # ---------------------------------------------------------------- images and features

    def _check_images(self, X, y, category, groups, reset=False):
        """Images, which rows of them are normal, and of these the categories and groups, if given; all checked."""
        data = self._check_X(X, reset)
        rows = normal_rows(_labels(X, y), len(data))
        if isinstance(data, FeatureArray):
            check_range(data, rows)
        given = check_category(category, len(data)), check_groups(groups, len(data))
        return data, rows, *(taken(each, rows) for each in given)

    def _check_X(self, X, reset=False):
        """Images or features, checked, as something with a length, sizes and chunks."""
        if self.backbone is None:
            return check_features(self, X, reset)
        is_table = isinstance(X, np.ndarray) or hasattr(X, "iloc")
        if is_table and X.ndim == 2 and self.image_shape is not None:
            X = validate_data(self, X, reset=reset, ensure_all_finite=False, dtype=None)
        return check_images(X, image_shape=None if self.image_shape is None else tuple(self.image_shape))

    def _extract(self, data, rows, device) -> tuple[FeatureStore, np.ndarray]:
        """Features and descriptors of the images ``rows``: each image passes the backbone once."""
        # In float32 also where the model computes in bfloat16: Gaussians look at directions of little variance.
        store = FeatureStore(len(rows))
        bar = tqdm(total=len(rows), desc="features", unit="image", disable=not self.verbose)

        def keep(places: np.ndarray) -> list[np.ndarray]:
            descriptor, done = [], 0
            for part, maps in self._iter_features(data, device, rows[places]):
                store.write(places[done : done + len(part)], maps)
                descriptor.append(describe(maps))
                done += len(part)
                bar.update(len(part))
            return descriptor

        with bar:
            descriptors = list(self._side_by_side(keep, data, np.arange(len(rows)), device))
        return store, np.concatenate(descriptors)

    def _side_by_side(self, work, data, rows, device) -> Iterator:
        """``work`` on parts of ``rows``, in threads unless a caller's own code reads or describes the images."""
        is_ready = isinstance(data, FeatureArray)
        own = not is_ready and not isinstance(self.features_, BackboneFeatures)
        chunk = data.chunk_size(device) if is_ready else 1
        return side_by_side(work, rows, device, wanted=data.reads_in_threads and not own, chunk=chunk)

    def _iter_features(self, data, device, rows=None) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
        rows = np.arange(len(data)) if rows is None else rows
        if isinstance(data, FeatureArray):
            yield from data.chunks(rows, device)
            return
        how = {"memory": self.memory, "n_jobs": self.n_jobs}
        if isinstance(self.features_, BackboneFeatures):
            if isinstance(self.backbone, str):  # made by fit, maybe for another machine
                how |= {"device": device, "precision": self.precision}
            yield from self.features_.iter_maps(data, rows, **how)
            return
        for part, maps in transformer_maps(self.features_, data, rows, device, self._map_shape, **how):
            if self._map_shape is None:
                self._map_shape = (1, *maps[0].shape[2:], maps[0].shape[1])
            yield part, maps

    def __sklearn_is_fitted__(self):
        return hasattr(self, "_prototypes")  # what `fit` learns last

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        inputs, takes_images = tags.input_tags, self.backbone is not None
        inputs.two_d_array = not takes_images or self.image_shape is not None
        inputs.three_d_array = inputs.string = takes_images  # strings are paths
        inputs.positive_only = takes_images
        tags.non_deterministic = False
        return tags


def _labels(X, y):
    """Labels as given, or those of a collection that has some."""
    return X.target if y is None and isinstance(X, ImageDataset) else y


def resize_map(grid_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map (h, w) at the image's own size."""
    if grid_map.shape == tuple(size):
        return grid_map
    tensor = torch.from_numpy(grid_map)[None, None]
    return F.interpolate(tensor, tuple(size), mode="bilinear", align_corners=True)[0, 0].numpy()
