"""Splitting images into training and held-out ones, and subsampling them."""

from __future__ import annotations

import numpy as np

from vqad._warn import warn


def hold_out(
    index: np.ndarray, fraction: float, seed: int, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to keep and rows to hold out, sorted: the same share of each category, and at least one of two or more.

    With groups, that share of the groups of each category is held out, and one random image of each: images of a kept
    group, or further images of a held-out group, say nothing about new groups.
    """
    rng = np.random.RandomState(seed % 2**32)
    first = None if groups is None else rng.permutation(groups.max(initial=0) + 1)
    kept, held = [index[:0]], [index[:0]]
    for c in np.unique(index):
        rows = rng.permutation(np.flatnonzero(index == c))
        # Groups have one order for all categories, which therefore hold out much the same groups.
        order = np.arange(len(rows))
        if groups is not None and first is not None:
            order = np.unique(first[groups[rows]], return_inverse=True)[1]
        n_units = order.max() + 1
        is_held = order < min(n_units - 1, max(1, round(fraction * n_units)))
        _, one_of_each = np.unique(order[is_held], return_index=True)
        held.append(rows[is_held][one_of_each])
        kept.append(rows[~is_held])
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(held))


def of_rows(each: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    """``each[rows]``, or None if ``each`` is None."""
    return None if each is None else each[rows]


def some_of_each(rows: np.ndarray, index: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """A random subsample of the rows, in order: at most ``limit`` of each category, which ``index`` gives."""
    rng = np.random.RandomState(seed % 2**32)
    chosen = [rows[:0]]
    for c in np.unique(index):
        own = rows[index == c]
        chosen.append(own if len(own) <= limit else rng.permutation(own)[:limit])
    return rows[np.isin(rows, np.concatenate(chosen))]


def warn_of_single_images(categories: np.ndarray, index: np.ndarray, groups: np.ndarray | None = None) -> None:
    """Warn about categories with a single image or group; ``index`` is the category of each image."""
    units = np.arange(len(index)) if groups is None else groups
    found, count = np.unique(np.unique(np.stack([index, units]), axis=1)[0], return_counts=True)
    names = categories[found[count == 1]]
    if len(names):
        names, unit = ", ".join(map(repr, names.tolist())), "image" if groups is None else "group"
        warn(
            f"Category {names} has a single {unit}, which does not show how its normal {unit}s vary: others are likely "
            "to be called anomalies. Give more, or correct the label."
        )


def split_rows(
    index: np.ndarray,
    fraction: float,
    seed: int,
    groups: np.ndarray | None = None,
    otherwise: str = "thresholds come from the training images",
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to keep and rows to hold out, see `hold_out`; if none can be held out, both are all rows, with a warning."""
    keep, held_out = hold_out(index, fraction, seed, groups)
    if len(held_out) == 0:
        warn(f"There are too few {'images' if groups is None else 'groups'} to hold any out: {otherwise}.")
        held_out = keep
    return keep, held_out
