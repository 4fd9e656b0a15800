"""Checks of the arguments of fit: ready-made features, labels, categories, groups."""

from __future__ import annotations

from numbers import Integral
from os import PathLike
from typing import Any

import numpy as np
from sklearn.utils import check_array
from sklearn.utils.validation import validate_data

from vqad._warn import warn
from vqad.store import FeatureArray

# The largest feature to learn from: sums of squares must fit into float32.
LARGEST_FEATURE = 1e15
# Features that are checked together.
FEATURES_AT_ONCE = 2**22


def check_features(estimator: Any, X: Any, map_shape: tuple[int, ...] | None) -> FeatureArray:
    """Check features: rows (n, C) or maps (n, h, w, C), as an array or a list, of the shape (h, w, C) seen in fit."""
    if isinstance(X, (list, tuple)) and any(getattr(item, "ndim", None) == 3 for item in X[:1]):
        shapes = sorted({tuple(np.shape(item)) for item in X})
        if len(shapes) > 1:
            raise ValueError(
                f"X is a list of feature maps of shapes {shapes[0]} and {shapes[1]}: all must have one shape (h, w, C)."
            )
        X = np.stack([np.asarray(item) for item in X])
    if getattr(X, "ndim", 2) == 4:
        if str(X.dtype).endswith(("uint8", "uint16")) and X.shape[3] in (1, 3, 4):
            raise ValueError(
                f"X has shape {tuple(X.shape)} and dtype {X.dtype}: these are images, but backbone=None takes features."
            )
        maps = check_array(X, dtype=np.float32, allow_nd=True, copy=False)
        if map_shape not in (None, maps.shape[1:]):
            raise ValueError(
                f"X has feature maps of shape {maps.shape[1:]}, but fit saw maps of shape {map_shape} (h, w, C)."
            )
        return FeatureArray(maps)
    table = validate_data(estimator, X, reset=map_shape is None, dtype=np.float32)
    if map_shape not in (None, (1, 1, table.shape[1])):
        raise ValueError(f"X has rows of features, but fit saw maps of shape {map_shape} (h, w, C).")
    return FeatureArray(table[:, None, None, :])


def check_range(data: FeatureArray, rows: np.ndarray) -> None:
    """Raise ValueError for features that are too large to learn from. Judging accepts features of any size."""
    n_at_once = max(1, FEATURES_AT_ONCE // data.values[0].size)
    for part in np.split(rows, range(n_at_once, len(rows), n_at_once)):
        largest = np.abs(data.values[part]).reshape(len(part), -1).max(1)
        worst = int(largest.argmax())
        if largest[worst] > LARGEST_FEATURE:
            raise ValueError(
                f"X[{part[worst]}] has a feature of size {largest[worst]:.3g}, but fit accepts at most "
                f"{LARGEST_FEATURE:g}, because squares of larger ones overflow. Leave the image out, or rescale the "
                "features."
            )


def normal_rows(y, n: int) -> np.ndarray:
    """Rows to train on, at least one: all except those labelled -1."""
    if y is None:
        return np.arange(n)
    y = np.asarray(y)
    if y.shape != (n,):
        raise ValueError(f"y has shape {y.shape}, but X has {n} images: one label of +1 or -1 each is expected.")
    if not np.isin(y, (-1, 1)).all():
        warn("y has values other than +1 (normal) and -1 (anomaly), so it is ignored: all images are taken as normal.")
        return np.arange(n)
    rows = np.flatnonzero(y == 1)
    if len(rows) == 0:
        raise ValueError("There is no normal image to learn from: y is -1 for every image.")
    return rows


def check_labels(y: Any, n: int) -> np.ndarray:
    """Check labels for setting a threshold: (n,) of +1 and -1, not all of them -1."""
    y = np.asarray(y)
    if y.shape != (n,):
        raise ValueError(f"y has shape {y.shape}, but X has {n} images: one label of +1 or -1 each is expected.")
    if not np.isin(y, (-1, 1)).all():
        values = ", ".join(map(repr, np.unique(y[~np.isin(y, (-1, 1))].astype(str))[:3].tolist()))
        raise ValueError(f"y must contain only +1 (normal) and -1 (anomaly); it also contains {values}.")
    if not (y == 1).any():
        raise ValueError(
            f"y is -1 for all {n} images: a threshold needs normal images (+1), with or without anomalies (-1)."
        )
    return y.astype(int)


def check_category(category, n: int) -> np.ndarray | None:
    if category is None:
        return None
    # Not np.asarray: it would turn all labels of a list into strings if one is a string.
    given = list(category) if isinstance(category, (list, tuple)) else np.asarray(category).tolist()
    if np.shape(category) != (n,):
        raise ValueError(f"category has shape {np.shape(category)}, but X has {n} images: one label each is expected.")
    if all(isinstance(label, str) for label in given):
        return np.array(given, dtype=str)
    if all(isinstance(label, (Integral, np.bool_)) for label in given):
        if not all(abs(int(label)) < 2**63 for label in given):
            raise ValueError("category has numbers outside the range of 64-bit integers: pass them as str.")
        return np.array([int(label) for label in given], dtype=np.int64)
    names = ", ".join(sorted({type(label).__name__ for label in given}))
    raise ValueError(f"category must have a label for each image, all of them str or all int; got {names}.")


def is_missing(value: Any) -> bool:
    """Whether an entry of a table is None, nan, NaT or pandas' NA, which equals nothing."""
    is_scalar = not isinstance(value, (str, PathLike)) and not hasattr(value, "__len__")
    return is_scalar and str(value) in ("None", "nan", "NaT", "<NA>")


def check_none_missing(category: Any) -> None:
    """Raise ValueError if a label is missing."""
    # As objects: numpy would turn all labels into strings if one is a string.
    missing = [label for label in np.asarray(category, dtype=object).flat if is_missing(label)]
    if missing:
        raise ValueError(f"category is missing ({missing[0]}) for {len(missing)} images: give each a label.")


def known_index(category: np.ndarray, categories: np.ndarray) -> np.ndarray:
    """Position of each label in ``categories``, -1 for unknown ones.

    Raises
    ------
    ValueError
        When the labels have another type than ``categories``.
    """
    if category.dtype.kind != categories.dtype.kind:
        known = ", ".join(map(repr, categories[:3].tolist())) + (", ..." if len(categories) > 3 else "")
        raise ValueError(
            f"category has labels such as {category[0].item()!r}, but the detector knows {known}. Labels must have the "
            "same type, str or int, as in fit; discovered categories are numbers: pass numbers, or fit with labels."
        )
    position = {label: k for k, label in enumerate(categories.tolist())}
    return np.array([position.get(label, -1) for label in category.tolist()], dtype=np.int64)


def check_groups(groups, n: int) -> np.ndarray | None:
    """Number of the group of each of ``n`` images; None if each image is a group of its own."""
    if groups is None:
        return None
    if isinstance(groups, (list, tuple)):  # not np.asarray: it would turn labels that are tuples into a table
        labels, shape = list(groups), (len(groups),)
    else:
        labels, shape = np.asarray(groups, dtype=object).tolist(), np.shape(groups)
    if shape != (n,):
        raise ValueError(f"groups has shape {shape}, but X has {n} images: one group each is expected.")
    labels = [label.item() if np.ndim(label) == 0 and hasattr(label, "item") else label for label in labels]
    missing = sum(map(is_missing, labels))
    if missing:
        raise ValueError(f"groups is missing for {missing} images: give each image a group, if need be of its own.")
    number: dict[Any, int] = {}
    try:
        index = np.array([number.setdefault(label, len(number)) for label in labels], dtype=np.int64)
    except TypeError as error:
        raise TypeError(f"groups must have hashable labels, such as str or int: {error}.") from error
    return None if len(number) == n else index
