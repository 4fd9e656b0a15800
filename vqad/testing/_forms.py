"""Checks of all forms of X and y: the same pixels give the same scores, and inputs are not changed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from vqad.testing._tools import (
    assert_same,
    crude_defects,
    fitted,
    image_check,
    methods_of,
    new_images,
    outputs,
    save_all,
    train_images,
)


@image_check
def check_dtypes(name, detector):
    """Pixels of 8 and 16 bits and floats in 0..1 give the same scores, in fit and in scoring."""
    made, X = fitted(detector), new_images()
    expected = outputs(made, X)
    forms = {
        "uint16": lambda x: x.astype(np.uint16) * 257,
        "float32": lambda x: x.astype(np.float32) / np.float32(255),
        "float64": lambda x: x / 255,
    }
    for dtype, form in forms.items():
        assert_same(name, outputs(made, form(X)), expected, f"for the same pixels as {dtype}")
        again = fitted(detector, form(train_images()))
        assert_same(name, outputs(again, X), expected, f"when fit had the same pixels as {dtype}")


@image_check
def check_lists(name, detector):
    """Images in a list, also with images of other sizes, score as in an array."""
    made, X = fitted(detector), new_images()
    expected = outputs(made, X)
    assert_same(name, outputs(made, list(X)), expected, "for a list of the images")
    assert_same(name, outputs(fitted(detector, list(train_images())), X), expected, "when fit had a list of images")
    ragged = outputs(made, [*X, X[0][:40], X[1][:, :50]])
    whole = {method: values[: len(X)] for method, values in ragged.items()}
    assert_same(name, whole, expected, "in a list with images of other sizes")


@image_check
def check_paths(name, detector):
    """PNG files, as str or Path, score as their pixels."""
    made, X = fitted(detector), new_images()
    expected = outputs(made, X)
    with tempfile.TemporaryDirectory() as folder:
        paths = save_all(folder, X)
        assert_same(name, outputs(made, paths), expected, "for a list of paths (str)")
        assert_same(name, outputs(made, [Path(path) for path in paths]), expected, "for a list of paths (Path)")
        again = fitted(detector, save_all(folder, train_images()))
    assert_same(name, outputs(again, X), expected, "when fit had paths")


@image_check
def check_grey(name, detector):
    """Grey images, with a channel axis or without, score as the same grey in three channels."""
    made, grey = fitted(detector), new_images()[..., 1]
    expected = outputs(made, np.repeat(grey[..., None], 3, axis=3))
    assert_same(name, outputs(made, grey), expected, "for grey images of shape (H, W)")
    assert_same(name, outputs(made, grey[..., None]), expected, "for grey images of shape (H, W, 1)")


@image_check
def check_read_only_images(name, detector):
    X = train_images()
    X.setflags(write=False)
    made = fitted(detector, X)
    for method in methods_of(made):
        getattr(made, method)(X[:3])


@image_check
def check_input_is_not_written_to(name, detector):
    for X in (train_images(), train_images() / 255, list(train_images())):
        before, items, y = [np.array(image) for image in X], list(X), np.ones(len(X), dtype=int)
        made = fitted(detector, X, y)
        for method in methods_of(made):
            getattr(made, method)(X)
        assert len(X) == len(before) and all(np.array_equal(a, b) for a, b in zip(X, before)), (  # noqa: PT018
            f"{name} writes to X ({type(X).__name__})."
        )
        if isinstance(X, list):
            assert all(a is b for a, b in zip(X, items)), f"{name} puts other images into the list X."
        assert (y == 1).all(), f"{name}.fit writes to y."


@image_check
def check_labelled_outliers_are_left_out(name, detector):
    """Images labelled -1 in y do not affect fit."""
    good, bad = train_images(), crude_defects()[0]
    X = np.concatenate([good[:10], bad[:5], good[10:], bad[5:]])
    y = np.repeat([1, -1, 1, -1], [10, 5, 14, 3])
    expected = outputs(fitted(detector), new_images())
    assert_same(name, outputs(fitted(detector, X, y), new_images()), expected, "when y labels further images -1")
    assert_same(name, outputs(fitted(detector, good, np.ones(24)), new_images()), expected, "when y is +1 everywhere")
