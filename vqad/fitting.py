"""Learning all categories together, from scratch or with a warm start. Independent of the estimator."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch

from vqad import collective
from vqad._checks import known_index
from vqad._warn import warn
from vqad.backbones import state_digest
from vqad.batches import ScaledFeatures, TrainingBatches, channel_statistics
from vqad.calibration import Seen, learn_terms, score_seen, set_thresholds
from vqad.checkpoint import Checkpoint, fingerprint
from vqad.copies import exact_copies, merged, pieces
from vqad.engine import learning, lent
from vqad.fitted import Fitted, History
from vqad.nn.draws import drawing
from vqad.nn.model import AnomalyModel, FeatureShape
from vqad.prototypes import Prototypes, add_prototypes
from vqad.routing import CategoryRouter
from vqad.sampling import Sample, Split, draw_tiles, hold_scans
from vqad.scoring import Scaling, Scorer, judge_images
from vqad.source import MapSource
from vqad.splitting import hold_out, of_rows, some_of_each, split_rows, warn_of_single_images
from vqad.store import FeatureStore
from vqad.training import Trainer
from vqad.training_run import TrainingLog, TrainingPlan

# Images from which the scale of the features and the model's initialisation are computed: per category at most 200, or
# more if that makes fewer than 2,000 in all.
START_PER_CATEGORY, START_IMAGES = 200, 2000


@dataclass(frozen=True)
class Settings:
    """Settings from the parameters of a detector.

    Attributes
    ----------
    make_model : callable
        Creates a model from a `FeatureShape`, the number of categories, and how many of them were added after `fit`.
    plan : TrainingPlan
    training : mapping
        All parameters that a trained model depends on; they identify a checkpoint.
    is_seeded : bool
        Whether ``random_state`` is given.
    map_shape : tuple of int or None
        Shape of given features.
    gaussian, standardize, contamination, false_alarm_rate, per_category, calibration_fraction, validation_fraction
    checkpoint_dir, n_jobs, verbose
        As the parameters of these names; ``per_category``: whether ``threshold="category"``.
    """

    make_model: Callable[[FeatureShape, int, int], AnomalyModel]
    plan: TrainingPlan
    training: Mapping[str, Any]
    is_seeded: bool
    map_shape: tuple[int, ...] | None
    gaussian: bool
    standardize: bool
    contamination: Any
    false_alarm_rate: float
    per_category: bool
    calibration_fraction: float
    validation_fraction: float
    checkpoint_dir: str | PathLike[str] | None
    n_jobs: int | None
    verbose: int


class Images(NamedTuple):
    """Normal images to learn from.

    Attributes
    ----------
    source : MapSource
    rows : ndarray of int
        Indices of the images in the source.
    category : ndarray of shape (len(rows),) or None
        Labels; None to discover them.
    groups : ndarray of shape (len(rows),) or None
        Number of each image's group; None if each image is a group of its own.
    """

    source: MapSource
    rows: np.ndarray
    category: np.ndarray | None
    groups: np.ndarray | None


# ---- all categories at once --------------------------------------------------------------------------


def fit(images: Images, settings: Settings, seed: int, before: Fitted | None = None) -> Fitted:
    """Learn from scratch, or with a warm start from the state ``before``."""
    engine = images.source.engine
    with learning(seed, engine.device), images.source.drawing():
        store, descriptor = images.source.extract(images.rows, settings.verbose)
    checkpoint = _open_checkpoint(images, store, settings, seed, before)
    seed = seed if checkpoint is None else checkpoint.seed
    with learning(seed, engine.device):
        fitted = _fit(images, store, descriptor, settings, seed, checkpoint, before)
    if checkpoint is not None and not settings.is_seeded and not fitted.history.log.interrupted:
        checkpoint.remove()  # the next fit will be a different one
    return fitted


def check_labels(
    category: np.ndarray | None, groups: np.ndarray | None, settings: Settings, before: Fitted | None, warm: bool
) -> None:
    """Raise for labels that cannot be learned, before the slow extraction of features.

    Problems with discovered categories are found later.
    """
    if category is None:
        return
    if before is not None:
        index = known_index(category, before.categories)
        if not warm:
            category, groups = category[index < 0], of_rows(groups, index < 0)
        elif set(index) != set(range(len(before.categories))):
            raise ValueError(
                f"warm_start=True needs images of all categories {before.categories.tolist()}; got "
                f"{np.unique(category).tolist()}. Use partial_fit to add categories or to learn more of some of them."
            )
    names, index = np.unique(category, return_inverse=True)
    _, held_out = hold_out(index, settings.calibration_fraction, 0, groups)
    if len(held_out):  # otherwise thresholds come from the training images
        check_each_held_out(settings, np.delete(names, np.unique(index[held_out])), groups)


def _open_checkpoint(
    images: Images, store: FeatureStore, settings: Settings, seed: int, before: Fitted | None
) -> collective.AnyCheckpoint | None:
    """The checkpoint of this training, identified by its features, parameters and initial state."""
    if settings.checkpoint_dir is None:
        return None
    start = None
    if before is not None:
        start = state_digest(before.scorer.model), len(before.history.loss_curve), before.seed
    labels = [None if each is None else each.tolist() for each in (images.category, images.groups)]
    engine, drawn = images.source.engine, seed if settings.is_seeded else None
    name = fingerprint(
        sorted(settings.training.items()), start, labels, engine.device.type, engine.dtype, drawn, store.digest()
    )
    crew = collective.crew()
    if crew is None:
        return Checkpoint(settings.checkpoint_dir, name, seed)
    return collective.SharedCheckpoint(settings.checkpoint_dir, name, seed, crew)


def _fit(
    images: Images,
    store: FeatureStore,
    descriptor: np.ndarray,
    settings: Settings,
    seed: int,
    checkpoint: collective.AnyCheckpoint | None,
    before: Fitted | None,
) -> Fitted:
    source, rows, category, groups = images
    if before is None:
        known = merged(groups, exact_copies(descriptor))
        router, categories, index = CategoryRouter.learn(descriptor, category, groups=known, random_state=seed)
    else:
        router, categories = copy.deepcopy(before.scorer.router), before.categories
        index = _same_categories(router, categories, descriptor, category)
        seed = before.seed  # a second fit on the same images must hold out the same ones
    router.set_limits(descriptor, index)
    groups = pieces(source.data, rows, groups, descriptor, index, seed)
    images = images._replace(groups=groups)
    split = _split(settings, categories, index, groups, seed)
    sample = sample_of(images, store, index, split, seed, settings)
    train = sample.split.train
    limit = max(START_PER_CATEGORY, START_IMAGES // len(categories))
    some = some_of_each(train, sample.index[train], limit, seed)
    maps = source.of_backbone(sample.store.maps)
    scaling = (
        _learn_scaling(sample.store, some, settings.standardize, len(maps)) if before is None else before.scorer.scaling
    )
    shape = FeatureShape(
        tuple(m.shape[1] for m in maps), tuple((m.shape[2], m.shape[3]) for m in maps),
        source.strides, source.has_deep_view,
    )  # fmt: skip
    with drawing():
        model = settings.make_model(shape, len(categories), 0 if before is None else before.scorer.model.n_added)
    scorer = Scorer(
        router, scaling, model,
        gaussian=settings.gaussian, strides=source.strides, own_units=source.features is None,
    )  # fmt: skip
    if before is not None:
        _take_over(model, before.scorer.model)
    features, known = ScaledFeatures(sample.store, scorer.model_input, source.engine), sample.index
    with lent(model, source.engine.device):
        if before is None and (checkpoint is None or checkpoint.state is None):
            with drawing():
                model.start(batches_of(features, known, some, settings))
        watched = sample.split.validation
        log = train_model(features, model, known, train, settings, validation=watched, checkpoint=checkpoint)
        with drawing():
            model.settle(batches_of(features, known, train, settings))
    model.rest()
    scorer, held = learn_terms(scorer, sample.learned(descriptor), source.engine, seed)
    if source.tiling is not None:
        held = hold_scans(scorer, source, rows[split.held_out], index[split.held_out], n_known=0)
    seen = seen_of(scorer, sample, images, descriptor, settings)
    if checkpoint is not None and not log.interrupted:
        checkpoint.write({"model": model.state_dict(), "log": asdict(log)}, finished=True)
    return Fitted(
        features=source.features,
        map_shape=settings.map_shape or source.map_shape,
        ignore=source.ignore,
        tiles=None if source.tiling is None else (source.tiling.size, source.tiling.overlap),
        categories=categories,
        scorer=scorer,
        held_out=held,
        seen=seen,
        thresholds=thresholds_of(held, seen, categories, settings),
        prototypes=add_prototypes(Prototypes(), scorer, sample, source),
        history=(History() if before is None else before.history).append(log),
        n_images=len(index),
        seed=seed,
    )


def thresholds_of(held: Any, seen: Seen, categories: np.ndarray, settings: Settings) -> Any:
    return set_thresholds(
        held, seen, categories, settings.contamination, settings.false_alarm_rate, settings.per_category
    )


def _learn_scaling(store: FeatureStore, rows: np.ndarray, standardize: bool, n_maps: int) -> Scaling:
    """The scale of the last ``n_maps`` maps."""
    if not standardize:
        return Scaling([1] * n_maps)
    scaling = Scaling([m.shape[1] for m in store.maps[-n_maps:]])
    moments_of = zip(*(each[-n_maps:] for each in channel_statistics(store, rows)))
    for k, moments in enumerate(moments_of):
        for name, value in zip(("mean", "scale"), moments):
            getattr(scaling, f"{name}_{k}").copy_(value)
    return scaling


def sample_of(
    images: Images, store: FeatureStore, index: np.ndarray, split: Split, seed: int, settings: Settings
) -> Sample:
    """The maps to learn from: those of whole images in ``store``, or maps of their tiles."""
    source, rows, _, groups = images
    if source.tiling is None:
        return Sample(store, index, split, groups, rows)
    return draw_tiles(source, rows, index, split, groups, seed, settings.verbose)


def seen_of(scorer: Scorer, sample: Sample, images: Images, descriptor: np.ndarray, settings: Settings) -> Seen:
    """Scores of all images given, if ``contamination`` needs them."""
    if settings.contamination == "auto":
        return Seen()
    if images.source.tiling is None:
        return score_seen(scorer, sample.learned(descriptor), images.source.engine)
    judged = judge_images(scorer, images.source, images.rows, keep_maps=False)
    return Seen(judged.category, judged.score)


def batches_of(features: ScaledFeatures, index: np.ndarray, rows: np.ndarray, settings: Settings) -> Any:
    return TrainingBatches(features, torch.from_numpy(index), torch.from_numpy(rows), settings.plan.batch_size)


def train_model(
    features: ScaledFeatures,
    model: AnomalyModel,
    index: np.ndarray,
    train: np.ndarray,
    settings: Settings,
    *,
    categories: list[int] | None = None,
    n_passes: int | None = None,
    validation: np.ndarray | None = None,
    checkpoint: collective.AnyCheckpoint | None = None,
) -> TrainingLog:
    """Train the model, or only the parts that belong to the given categories."""
    plan = replace(settings.plan, clip_norm=model.clip_norm)
    trainer = Trainer(
        model,
        features,
        torch.from_numpy(np.maximum(index, 0)),
        plan if n_passes is None else replace(plan, max_iter=n_passes),
        device=features.engine.device,
        dtype=features.engine.dtype,
        parts=None if categories is None else model.parts_of(categories),
    )
    return trainer.fit(
        torch.from_numpy(train), None if validation is None else torch.from_numpy(validation), checkpoint
    )


def _split(
    settings: Settings, categories: np.ndarray, index: np.ndarray, groups: np.ndarray | None, seed: int
) -> Split:
    """Rows for training, for early stopping (if any), and for scales and thresholds."""
    train, held_out = split_rows(index, settings.calibration_fraction, seed, groups)
    check_each_held_out(settings, np.delete(categories, np.unique(index[held_out])), groups)
    _warn_of_unused(len(index), len(train) + len(held_out))
    warn_of_single_images(categories, index, groups)
    if not settings.plan.early_stopping:
        return Split(train, None, held_out)
    keep, chosen = split_rows(
        index[train], settings.validation_fraction, seed + 1, of_rows(groups, train),
        otherwise="early stopping watches the training images",
    )  # fmt: skip
    return Split(train[keep], train[chosen], held_out)


def _warn_of_unused(n: int, n_used: int) -> None:
    """Warn if large groups are held out, whose other images are not used."""
    if n_used < n / 2:
        warn(
            f"{n - n_used} of {n} images are not used, because only one image of each held-out group is. Another "
            "random_state holds out other groups; groups of similar size waste fewer images."
        )


def check_each_held_out(settings: Settings, alone: np.ndarray, groups: np.ndarray | None) -> None:
    """Raise if thresholds are per category and the categories ``alone`` have no held-out image."""
    if settings.per_category and len(alone):
        units = "images" if groups is None else "groups"
        raise ValueError(f"threshold='category' needs at least 2 {units} of each category; {alone[0]} has 1.")


def _same_categories(
    router: CategoryRouter, categories: np.ndarray, descriptor: np.ndarray, category: np.ndarray | None
) -> np.ndarray:
    """Categories of the images of a warm start."""
    if category is not None:
        return known_index(category, categories)
    index: np.ndarray = router(torch.from_numpy(descriptor))[0].numpy()
    missed = np.setdiff1d(np.arange(len(categories)), index)
    if len(missed):
        raise ValueError(
            f"warm_start=True needs images of all categories {categories.tolist()}, but no image is nearest to "
            f"{categories[missed].tolist()}. Use partial_fit to learn more of some of them."
        )
    return index


def _take_over(model: AnomalyModel, before: AnomalyModel) -> None:
    """Load the state of the model of an earlier fit."""
    try:
        model.load_state_dict(before.state_dict())
    except RuntimeError as error:
        raise ValueError(
            "warm_start=True continues with the model of the last fit, but images or parameters now need a model of "
            f"another shape: {str(error).splitlines()[-1].strip()} Use warm_start=False."
        ) from error
