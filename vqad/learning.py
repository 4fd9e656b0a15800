"""Learning from features: all categories at once, from the start or warm, or more of some and new ones.

In `partial_fit` what the categories share stays as it is: the backbone, the scale of the features, the space that
images are routed in, the weights that all categories use, the spread that their scores are pulled to. So nothing moves
for a category that no new image belongs to.
"""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import torch
from torch import Tensor

from vqad._checks import hold_out, known_index, some_of_each, split_rows, taken, warn_of_single_images
from vqad._warn import warn
from vqad.backbones import state_digest
from vqad.checkpoint import Checkpoint, fingerprint
from vqad.device import native_precision
from vqad.routing import MIN_CATEGORY_SIZE, CategoryRouter
from vqad.store import ScaledFeatures, TrainingBatches, channel_statistics
from vqad.thresholds import calibrate
from vqad.training import Trainer

# Images that the scale of the features and the start of the model come from: of each category at most 200, or as many
# as make 2,000 in all.
START_PER_CATEGORY, START_IMAGES = 200, 2000

# Parameters that a trained model does not depend on, or only by its features, which a checkpoint knows otherwise.
NOT_OF_THE_TRAINING = {
    "backbone", "weights", "image_size", "image_shape", "contamination", "false_alarm_rate", "threshold", "warm_start",
    "checkpoint_dir", "device", "precision", "n_jobs", "memory", "random_state", "verbose",
}  # fmt: skip


def check_labels(detector, category, groups, how) -> None:
    """Raise for labels from which nothing can be learned ``how``: "anew", "warm" or "more".

    Before features are extracted, which takes long. What can be wrong with categories that are found comes later.
    """
    if category is None:
        return
    if how != "anew":
        index = known_index(category, detector.categories_)
        if how == "more":
            category, groups = category[index < 0], taken(groups, index < 0)
        elif set(index) != set(range(len(detector.categories_))):
            raise ValueError(
                f"warm_start=True goes on with the categories {detector.categories_.tolist()}; got "
                f"{np.unique(category).tolist()}. Use partial_fit to add categories or to go on with some of them."
            )
    names, index = np.unique(category, return_inverse=True)
    _, held_out = hold_out(index, detector.calibration_fraction, 0, groups)
    if len(held_out):  # else thresholds come from what is trained on
        _check_each_held_out(detector, np.delete(names, np.unique(index[held_out])), groups)


def open_checkpoint(detector, store, category, groups, device, seed, warm) -> Checkpoint | None:
    """The checkpoint of this very training, which is known by its features, parameters and start."""
    if detector.checkpoint_dir is None:
        return None
    parameters = {k: v for k, v in detector.get_params(deep=False).items() if k not in NOT_OF_THE_TRAINING}
    start = (state_digest(detector.model_), detector.n_iter_, detector._split_seed) if warm else None
    labels = [None if each is None else each.tolist() for each in (category, groups)]
    dtype = native_precision(device, detector.precision)
    drawn = None if detector.random_state is None else seed
    name = fingerprint(
        type(detector).__name__, sorted(parameters.items()), start, labels, device.type, dtype, drawn, store.digest(),
    )  # fmt: skip
    return Checkpoint(detector.checkpoint_dir, name, seed)


def learn_all(detector, store, descriptor, category, groups, device, seed, checkpoint, warm) -> np.ndarray:
    """Teach a detector all that it is to know, the images of ``store``, with labels and numbers of groups or None.

    Returns
    -------
    index : ndarray of shape (n,)
        Category of each image.
    """
    if warm:
        index = _same_categories(detector, descriptor, category)
    else:
        detector.router_ = CategoryRouter()
        index = detector.router_.fit(descriptor, category, groups=groups, random_state=seed)
        detector._split_seed = seed  # a second fit on the same images must hold out the same
        detector._n_first = len(detector.router_.categories_)
    detector.categories_ = detector.router_.categories_
    detector._distance_limit = detector._far_limits(descriptor, index)
    detector.n_images_ = len(index)
    train, validation, held_out = _split_all(detector, index, groups)
    if not warm:
        limit = max(START_PER_CATEGORY, START_IMAGES // len(detector.categories_))
        some = some_of_each(train, index[train], limit, detector._split_seed)
        detector.feature_mean_, detector.feature_scale_ = channel_statistics(store, some, detector.standardize)
    scaled = ScaledFeatures(store, detector._assembled)
    category_tensor = torch.from_numpy(index)

    before = detector.model_ if warm else None
    one = scaled.batch([0])
    one = [one] if isinstance(one, Tensor) else one
    detector._model_shapes = [m.shape[1] for m in one], [tuple(m.shape[2:]) for m in one]
    detector.model_ = detector._make_model(*detector._model_shapes, len(detector.categories_))
    batches = TrainingBatches(scaled, category_tensor, torch.from_numpy(train), detector.batch_size)
    if warm:
        _take_over(detector.model_, before)
    elif checkpoint is None or checkpoint.state is None:
        start = TrainingBatches(scaled, category_tensor, torch.from_numpy(some), detector.batch_size)
        detector._initialise(start)
    trainer = Trainer(
        detector.model_, scaled, category_tensor, detector._plan(),
        device=device, dtype=native_precision(device, detector.precision),
    )  # fmt: skip
    log = trainer.fit(torch.from_numpy(train), None if validation is None else torch.from_numpy(validation), checkpoint)
    detector._note(log, add=warm)
    detector._settle(batches)
    used = _only(index, train, validation, held_out)
    calibrate(detector, store, descriptor, used, train, held_out, device, groups)
    if checkpoint is not None and not log.interrupted:
        checkpoint.write({"model": detector.model_.state_dict(), "log": asdict(log)}, finished=True)
    return index


def _split_all(detector, index, groups) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Rows to train on, rows that early stopping watches, if it does, and rows that scales and thresholds come from."""
    train, held_out = split_rows(index, detector.calibration_fraction, detector._split_seed, groups)
    _check_each_held_out(detector, np.delete(detector.categories_, np.unique(index[held_out])), groups)
    _warn_of_unused(len(index), len(train) + len(held_out))
    warn_of_single_images(detector.categories_, index, groups)
    if not detector.early_stopping:
        return train, None, held_out
    keep, chosen = split_rows(
        index[train], detector.validation_fraction, detector._split_seed + 1, taken(groups, train),
        otherwise="early stopping watches the training images",
    )  # fmt: skip
    return train[keep], train[chosen], held_out


def _only(index, *used) -> np.ndarray:
    """The categories of images of which use is made; -1 for others of a group of which one is held out."""
    rows = np.concatenate([each for each in used if each is not None])
    return np.where(np.isin(np.arange(len(index)), rows), index, -1)


def _warn_of_unused(n: int, n_used: int) -> None:
    """Say that large groups are held out, of which nothing is learned."""
    if n_used < n / 2:
        warn(
            f"Of {n} images {n - n_used} are not used: they are of groups that are held out, of which one image each "
            "counts. Another random_state holds others out; groups of similar size lose less."
        )


def _check_each_held_out(detector, alone, groups) -> None:
    """Raise where categories are to have thresholds of their own, and those named ``alone`` have no held-out image."""
    if detector.threshold == "category" and len(alone):
        units = "images" if groups is None else "groups"
        raise ValueError(f"threshold='category' needs at least 2 {units} of every category; {alone[0]} has 1.")


def _same_categories(detector, descriptor, category) -> np.ndarray:
    """Categories of the images of a warm start."""
    if category is None:
        index = detector.router_.predict(descriptor)[0].astype(np.int64)
        missed = np.setdiff1d(np.arange(len(detector.categories_)), index)
        if len(missed):
            raise ValueError(
                f"warm_start=True goes on with the categories {detector.categories_.tolist()}; no image is nearest to "
                f"{detector.categories_[missed].tolist()}. Use partial_fit to go on with some of them."
            )
        return index
    return known_index(category, detector.categories_)


def _take_over(model, before) -> None:
    """Bring a model to the state of the model of an earlier fit."""
    try:
        model.load_state_dict(before.state_dict())
    except RuntimeError as error:
        raise ValueError(
            "warm_start=True goes on with the model of the last fit, but images or parameters now ask for a model of "
            f"another shape: {str(error).splitlines()[-1].strip()} Use warm_start=False."
        ) from error


def learn_more(detector, store, descriptor, category, groups, device, seed) -> np.ndarray:
    """Teach a fitted detector the images of ``store``, with labels and numbers of groups or None.

    Returns
    -------
    index : ndarray of shape (n,)
        Category of each image; -1 for those left out.
    """
    n_known = len(detector.categories_)
    index = _place(detector, descriptor, category, groups, seed)
    placed = np.flatnonzero(index >= 0)
    if not len(placed):
        return index
    detector.categories_ = detector.router_.categories_
    detector.n_images_ += len(placed)
    _set_limits(detector, descriptor[placed], index[placed], n_known)
    train, held_out = _split_more(detector, index, groups, placed, n_known, seed)
    _train_more(detector, store, index, train, n_known, device)
    if len(held_out):
        used = _only(index, train, held_out)
        calibrate(detector, store, descriptor, used, train, held_out, device, groups, n_known)
    return index


def _place(detector, descriptor, category, groups, seed) -> np.ndarray:
    """Category of every image, of which the router may learn new ones; -1 for images that are left out."""
    is_placed = np.ones(len(descriptor), dtype=bool)
    if category is None:
        nearest, excess = detector._route(descriptor)
        category, far = detector.categories_[nearest], excess > 0
        own = taken(groups, far)
        n_apart = far.sum() if own is None else len(np.unique(own))
        if n_apart >= MIN_CATEGORY_SIZE:
            new = detector.router_.discover_more(descriptor[far], seed, own)
            category = category.astype(np.result_type(category, new))
            category[far] = new
            names = ", ".join(map(repr, np.unique(new).tolist()))
            warn(f"{far.sum()} images are too far from every known category and are taken as new ones: {names}.")
        elif far.any():
            is_placed = ~far
            of = "" if own is None else f" of {n_apart} groups"
            warn(
                f"{far.sum()} images{of} are too far from every known category, and too few to be one of their own: "
                "they are left out. Give their category to have them learned."
            )
    index = known_index(category, detector.categories_)
    if (index < 0).any():
        detector.router_.extend(descriptor[index < 0], category[index < 0])
        index = known_index(category, detector.router_.categories_)
    return np.where(is_placed, index, -1)


def _set_limits(detector, descriptor, index, n_known) -> None:
    """New categories get a distance limit; those of known ones grow if their images now lie farther."""
    limits = detector._far_limits(descriptor, index)
    known = detector._distance_limit
    seen = np.isfinite(limits[:n_known])
    wider = np.where(seen, np.fmax(known, np.where(seen, limits[:n_known], 0)), known)
    detector._distance_limit = np.append(wider, limits[n_known:])


def _split_more(detector, index, groups, placed, n_known, seed) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to hold out; of a new category at least one is held out, if need be a trained one."""
    known, new = placed[index[placed] < n_known], placed[index[placed] >= n_known]
    train, held_out = [], []
    for rows, split in ((known, hold_out), (new, split_rows)):
        if len(rows):
            keep, chosen = split(index[rows], detector.calibration_fraction, seed, taken(groups, rows))
            train.append(rows[keep])
            held_out.append(rows[chosen])
    train, held_out = np.sort(np.concatenate(train)), np.sort(np.concatenate(held_out))
    _check_each_held_out(detector, detector.categories_[np.setdiff1d(index[new], index[held_out])], groups)
    warn_of_single_images(detector.categories_, index[new], taken(groups, new))
    return train, held_out


def _train_more(detector, store, index, train, n_known, device) -> None:
    """One pass over the images of known categories, ``max_iter`` over those of new ones."""
    scaled = ScaledFeatures(store, detector._assembled)
    category = torch.from_numpy(np.maximum(index, 0))
    is_new = index[train] >= n_known
    if is_new.any():
        batches = TrainingBatches(scaled, category, torch.from_numpy(train[is_new]), detector.batch_size)
        detector._add_categories(len(detector.categories_) - n_known, batches)
    for rows, n_passes, is_last in ((train[~is_new], 1, not is_new.any()), (train[is_new], detector.max_iter, True)):
        learning = [c for c in np.unique(index[rows]).tolist() if detector._parts_of([c])]
        rows = rows[np.isin(index[rows], learning)]
        if len(rows):
            parts = detector._parts_of(learning)
            trainer = Trainer(
                detector.model_, scaled, category, replace(detector._plan(), max_iter=n_passes),
                device=device, dtype=native_precision(device, detector.precision), parts=parts,
            )  # fmt: skip
            log = trainer.fit(torch.from_numpy(rows))
            detector._note(log, add=True)
            if log.interrupted and not is_last:
                raise KeyboardInterrupt  # rather than keep a category that was never trained
    if is_new.any():
        detector._settle(batches)
