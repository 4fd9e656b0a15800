"""How images are split: which are trained on, which are held out, which are looked at where some are enough."""

from __future__ import annotations

import numpy as np

from vqad._warn import warn


def hold_out(
    index: np.ndarray, fraction: float, seed: int, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to keep and rows to hold out, sorted: the same share of every category, at least one where there are two.

    Of groups that share is held out in each category, and of each of these one image, drawn at random: another image of
    a group that is kept, or a second one of a group that is held out, would say nothing of what new groups are like.
    """
    rng = np.random.RandomState(seed % 2**32)
    first = None if groups is None else rng.permutation(groups.max(initial=0) + 1)
    kept, held = [index[:0]], [index[:0]]
    for c in np.unique(index):
        rows = rng.permutation(np.flatnonzero(index == c))
        # A group comes before the same others in every category, which so hold out much the same ones.
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
    """What is given of ``rows``; None where nothing was given of any."""
    return None if each is None else each[rows]


def some_of_each(rows: np.ndarray, index: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """Rows in their order, of each category at most ``limit``, drawn at random; ``index`` is the category of each."""
    rng = np.random.RandomState(seed % 2**32)
    chosen = [rows[:0]]
    for c in np.unique(index):
        own = rows[index == c]
        chosen.append(own if len(own) <= limit else rng.permutation(own)[:limit])
    return rows[np.isin(rows, np.concatenate(chosen))]


def warn_of_single_images(categories: np.ndarray, index: np.ndarray, groups: np.ndarray | None = None) -> None:
    """Say which categories cannot be judged, with one image or group; ``index`` is the category of each image."""
    units = np.arange(len(index)) if groups is None else groups
    found, count = np.unique(np.unique(np.stack([index, units]), axis=1)[0], return_counts=True)
    names = categories[found[count == 1]]
    if len(names):
        names, unit = ", ".join(map(repr, names.tolist())), "image" if groups is None else "group"
        warn(
            f"Of category {names} there is one {unit}: nothing says how normal {unit}s of it differ, and others are "
            "likely to be called anomalies. Give more, or mend the label."
        )


def split_rows(
    index: np.ndarray,
    fraction: float,
    seed: int,
    groups: np.ndarray | None = None,
    otherwise: str = "thresholds come from the training images",
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to keep and rows to hold out, see `hold_out`; if none could be, all are both, and a warning says so."""
    keep, held_out = hold_out(index, fraction, seed, groups)
    if len(held_out) == 0:
        warn(f"Too few {'images' if groups is None else 'groups'} to hold any out: {otherwise}.")
        held_out = keep
    return keep, held_out
