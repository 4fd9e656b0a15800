"""Going on with a fitted detector: a warm start of all, or `partial_fit` of some categories and new ones.

In `partial_fit` what the categories share stays as it is: the backbone, the scale of the features, the space that
images are routed in, the weights that all categories use, the spread that their scores are pulled to. So nothing moves
for a category that no new image belongs to.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from vqad._checks import hold_out, known_index, split_rows, warn_of_single_images
from vqad._warn import warn
from vqad.device import native_precision
from vqad.routing import MIN_CATEGORY_SIZE
from vqad.store import ScaledFeatures, TrainingBatches
from vqad.thresholds import calibrate
from vqad.training import Trainer


def same_categories(detector, descriptor, category) -> np.ndarray:
    """Categories of the images of a warm start."""
    if category is None:
        return detector.router_.predict(descriptor)[0].astype(np.int64)
    index = known_index(category, detector.categories_)
    if set(index) != set(range(len(detector.categories_))):
        raise ValueError(
            f"warm_start=True goes on with the categories {detector.categories_.tolist()}; got "
            f"{np.unique(category).tolist()}. Use partial_fit to add categories or to go on with some of them."
        )
    return index


def take_over(model, before) -> None:
    """Bring a model to the state of the model of an earlier fit."""
    try:
        model.load_state_dict(before.state_dict())
    except RuntimeError as error:
        raise ValueError(
            "warm_start=True goes on with the model of the last fit, but images or parameters now ask for a model of "
            f"another shape: {str(error).splitlines()[-1].strip()} Use warm_start=False."
        ) from error


def learn_more(detector, store, descriptor, category, device, seed) -> np.ndarray:
    """Teach a fitted detector the images of ``store``; ``category`` are their labels, or None.

    Returns
    -------
    index : ndarray of shape (n,)
        Category of each image; -1 for those left out.
    """
    n_known = len(detector.categories_)
    index = _place(detector, descriptor, category, seed)
    placed = np.flatnonzero(index >= 0)
    if not len(placed):
        return index
    detector.categories_ = detector.router_.categories_
    detector.n_images_ += len(placed)
    _set_limits(detector, descriptor[placed], index[placed], n_known)
    train, held_out = _split(detector, index, placed, n_known, seed)
    _train(detector, store, index, train, n_known, device)
    if len(held_out):
        calibrate(detector, store, descriptor, index, train, held_out, device, n_known)
    return index


def _place(detector, descriptor, category, seed) -> np.ndarray:
    """Category of every image, of which the router may learn new ones; -1 for images that are left out."""
    taken = np.ones(len(descriptor), dtype=bool)
    if category is None:
        nearest, excess = detector._route(descriptor)
        category, far = detector.categories_[nearest], excess > 0
        if far.sum() >= MIN_CATEGORY_SIZE:
            new = detector.router_.discover_more(descriptor[far], seed)
            category = category.astype(np.result_type(category, new))
            category[far] = new
            names = ", ".join(map(repr, np.unique(new).tolist()))
            warn(f"{far.sum()} images are too far from every known category and are taken as new ones: {names}.")
        elif far.any():
            taken = ~far
            warn(
                f"{far.sum()} images are too far from every known category, and too few to be one of their own: they "
                "are left out. Give their category to have them learned."
            )
    index = known_index(category, detector.categories_)
    if (index < 0).any():
        detector.router_.extend(descriptor[index < 0], category[index < 0])
        index = known_index(category, detector.router_.categories_)
    return np.where(taken, index, -1)


def _set_limits(detector, descriptor, index, n_known) -> None:
    """New categories get a distance limit; those of known ones grow if their images now lie farther."""
    limits = detector._far_limits(descriptor, index)
    known = detector._distance_limit
    seen = np.isfinite(limits[:n_known])
    wider = np.where(seen, np.fmax(known, np.where(seen, limits[:n_known], 0)), known)
    detector._distance_limit = np.append(wider, limits[n_known:])


def _split(detector, index, placed, n_known, seed) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to hold out; of a new category at least one is held out, if need be a trained one."""
    fraction = detector.calibration_fraction
    known, new = placed[index[placed] < n_known], placed[index[placed] >= n_known]
    held_out = known[hold_out(index[known], fraction, seed)]
    train = np.setdiff1d(known, held_out)
    if len(new):
        keep, chosen = split_rows(index[new], fraction, seed)
        train, held_out = np.sort(np.append(train, new[keep])), np.sort(np.append(held_out, new[chosen]))
    alone = np.setdiff1d(index[new], index[held_out])
    if detector.threshold == "category" and len(alone):
        name = detector.categories_[alone[0]]
        raise ValueError(f"threshold='category' needs at least 2 images of every category; {name} has 1.")
    warn_of_single_images(detector.categories_, index[new])
    return train, held_out


def _train(detector, store, index, train, n_known, device) -> None:
    """One pass over the images of known categories, ``max_iter`` over those of new ones."""
    scaled = ScaledFeatures(store, detector.feature_mean_, detector.feature_scale_)
    category = torch.from_numpy(np.maximum(index, 0))
    is_new = index[train] >= n_known
    if is_new.any():
        batches = TrainingBatches(scaled, category, torch.from_numpy(train[is_new]), detector.batch_size)
        detector._add_categories(len(detector.categories_) - n_known, batches)
    for rows, n_passes in ((train[~is_new], 1), (train[is_new], detector.max_iter)):
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
            if log.interrupted:
                break
    if is_new.any():
        detector._settle(batches)
