"""Learning more: images of known categories, or new categories. Independent of the estimator.

Everything that categories share stays fixed: the backbone, the scale of the features, the space of the routing, the
shared weights. So nothing changes for a category without new images.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import cast

import numpy as np
import torch

from vqad._checks import known_index
from vqad._warn import warn
from vqad.batches import ScaledFeatures
from vqad.calibration import Seen, learn_terms
from vqad.copies import exact_copies, merged, pieces
from vqad.engine import learning, lent
from vqad.fitted import Fitted, History
from vqad.fitting import (
    Images,
    Settings,
    batches_of,
    check_each_held_out,
    sample_of,
    seen_of,
    thresholds_of,
    train_model,
)
from vqad.nn.draws import drawing
from vqad.nn.terms import TermScorer
from vqad.prototypes import add_prototypes
from vqad.routing import MIN_CATEGORY_SIZE, CategoryRouter, new_labels
from vqad.sampling import Sample, Split, hold_scans, judge_scans
from vqad.scoring import Scorer, score_and_map, stored_images
from vqad.source import MapSource
from vqad.splitting import hold_out, of_rows, split_rows, warn_of_single_images
from vqad.store import FeatureStore

# Images of a known category whose median score is so many standard deviations above its threshold are rejected.
STRANGE = 10.0


def extend(images: Images, settings: Settings, seed: int, before: Fitted) -> Fitted:
    """Learn more images of known categories, or new categories."""
    source, rows, category, groups = images
    with learning(seed, source.engine.device):
        with source.drawing():
            store, descriptor = source.extract(rows, settings.verbose)
        scorer = copy.deepcopy(before.scorer)
        known = merged(groups, exact_copies(descriptor))
        index, categories = _place(scorer.router, before.categories, descriptor, category, known, seed)
        index = _without_strange(before, store, index, source, rows)
        groups = pieces(source.data, rows, groups, descriptor, index, seed)
        images = images._replace(groups=groups)
        placed, n_known = np.flatnonzero(index >= 0), len(before.categories)
        after = replace(before, scorer=scorer, categories=categories, n_images=before.n_images + len(placed))
        if len(placed):
            scorer.router.set_limits(descriptor[placed], index[placed], n_known)
            train, held_out = _split_more(settings, categories, index, groups, placed, n_known, seed)
            sample = sample_of(images, store, index, Split(train, None, held_out), seed, settings)
            features = ScaledFeatures(sample.store, scorer.model_input, source.engine)
            with lent(scorer.model, source.engine.device):
                history = _train_more(features, scorer, sample, n_known, settings, before.history)
            after = replace(after, history=history)
            if len(held_out):
                after = _calibrate_more(after, sample, images, index, held_out, descriptor, settings)
        else:
            sample = Sample(store, index, Split(placed, None, placed), groups, rows)
        prototypes = add_prototypes(before.prototypes, after.scorer, sample, source)
        return replace(after, prototypes=prototypes)


def _place(
    router: CategoryRouter,
    categories: np.ndarray,
    descriptor: np.ndarray,
    category: np.ndarray | None,
    groups: np.ndarray | None,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Category of each image, -1 for images left out, and the labels of all categories; the router learns new ones."""
    is_placed = np.ones(len(descriptor), dtype=bool)
    if category is None:
        nearest, distance = router(torch.from_numpy(descriptor))
        category, far = categories[nearest.numpy()], (router.excess(nearest, distance) > 0).numpy()
        own = of_rows(groups, far)
        n_apart = far.sum() if own is None else len(np.unique(own))
        if n_apart >= MIN_CATEGORY_SIZE:
            new = new_labels(router.kinds_among(descriptor[far], seed, own), categories)
            category = category.astype(np.result_type(category, new))
            category[far] = new
            names = ", ".join(map(repr, np.unique(new).tolist()))
            warn(f"{far.sum()} images are too far from all known categories and form new ones: {names}.")
        elif far.any():
            is_placed = ~far
            of = "" if own is None else f" of {n_apart} groups"
            warn(
                f"{far.sum()} images{of} are too far from all known categories, and too few for a new one: they are "
                "left out. Pass their category to learn them."
            )
    index = known_index(category, categories)
    if (index < 0).any():
        labels, number = np.unique(category[index < 0], return_inverse=True)
        router.add(descriptor[index < 0], number)
        index[index < 0] = len(categories) + number
        categories = np.append(categories, labels)
    return np.where(is_placed, index, -1), categories


def _without_strange(
    before: Fitted, store: FeatureStore, index: np.ndarray, source: MapSource, rows: np.ndarray
) -> np.ndarray:
    """Set the category of images to -1 if the new images of a known category look nothing like its earlier ones.

    Thresholds that accept such images, say under another lamp, would accept defects too.
    """
    known = np.flatnonzero((index >= 0) & (index < len(before.categories)))
    if not len(known):
        return index
    if source.tiling is None:
        score = stored_images(before.scorer, store, known, index[known], source.engine, score_and_map)["score"]
    else:
        score, _ = judge_scans(before.scorer, source, rows[known], index[known])
    threshold, index = -np.broadcast_to(before.thresholds.offset, len(before.categories)), index.copy()
    for c in np.unique(index[known]):
        own = index[known] == c
        typical = float(np.median(score[own]))
        if typical > threshold[c] + STRANGE:
            name = before.categories[c].item()
            warn(
                f"{own.sum()} images of category {name!r} are left out: their median score, {typical:.1f}, is so far "
                f"above the threshold, {threshold[c]:.1f}, that a detector that accepts them would no longer find "
                "defects. If lamp or camera have changed for good, fit on images of both, give the new images a "
                "category of their own, or use recalibrate."
            )
            index[known[own]] = -1
    return index


def _split_more(
    settings: Settings,
    categories: np.ndarray,
    index: np.ndarray,
    groups: np.ndarray | None,
    placed: np.ndarray,
    n_known: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to hold out; of a new category at least one, if need be one that is also trained on."""
    known, new = placed[index[placed] < n_known], placed[index[placed] >= n_known]
    train, held_out = [], []
    for rows, split in ((known, hold_out), (new, split_rows)):
        if len(rows):
            keep, chosen = split(index[rows], settings.calibration_fraction, seed, of_rows(groups, rows))
            train.append(rows[keep])
            held_out.append(rows[chosen])
    train_rows, held_rows = np.sort(np.concatenate(train)), np.sort(np.concatenate(held_out))
    check_each_held_out(settings, categories[np.setdiff1d(index[new], index[held_rows])], groups)
    warn_of_single_images(categories, index[new], of_rows(groups, new))
    return train_rows, held_rows


def _train_more(
    features: ScaledFeatures,
    scorer: Scorer,
    sample: Sample,
    n_known: int,
    settings: Settings,
    history: History,
) -> History:
    """Train: one pass over images of known categories, ``max_iter`` passes over those of new ones."""
    model, index, train = scorer.model, sample.index, sample.split.train
    is_new = index[train] >= n_known
    if is_new.any():
        batches = batches_of(features, np.maximum(index, 0), train[is_new], settings)
        with drawing():
            model.extend(scorer.router.n_categories - n_known, batches)
    for rows, n_passes, is_last in ((train[~is_new], 1, not is_new.any()), (train[is_new], None, True)):
        learning = [c for c in np.unique(index[rows]).tolist() if model.parts_of([c])]
        rows = rows[np.isin(index[rows], learning)]
        if len(rows):
            log = train_model(features, model, index, rows, settings, categories=learning, n_passes=n_passes)
            history = history.append(log)
            if log.interrupted and not is_last:
                raise KeyboardInterrupt  # do not keep a category that was never trained
    if is_new.any():
        with drawing():
            model.settle(batches)
    model.rest()
    return history


def _calibrate_more(
    after: Fitted,
    sample: Sample,
    images: Images,
    index: np.ndarray,
    held_out: np.ndarray,
    descriptor: np.ndarray,
    settings: Settings,
) -> Fitted:
    """Set the scales of new categories, and all thresholds."""
    source, n_known = images.source, cast(TermScorer, after.scorer.terms).n_categories
    scorer, held = learn_terms(after.scorer, sample.learned(descriptor), source.engine, after.seed)
    if source.tiling is not None:
        held = hold_scans(scorer, source, images.rows[held_out], index[held_out], n_known)
    held, seen = after.held_out.append(held), after.seen
    if settings.contamination != "auto":
        # If contamination was "auto" before, only held-out images have scores.
        seen = seen if len(seen.score) else Seen(after.held_out.category, after.held_out.score)
        seen = seen.append(seen_of(scorer, sample, images, descriptor, settings))
    thresholds = thresholds_of(held, seen, after.categories, settings)
    return replace(after, scorer=scorer, held_out=held, seen=seen, thresholds=thresholds)
