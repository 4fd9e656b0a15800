"""Checks of the errors for invalid X and y."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import numpy as np

from vqad.testing._tools import fitted, image_check, new_images, save_all, train_images, unfitted


def _assert_explained(name, detector, X, what, pattern, errors=(ValueError, TypeError)):
    """Both fit and score_samples must reject X with a message that matches the pattern."""
    made = fitted(detector)
    for method, call in (("fit", unfitted(detector).fit), ("score_samples", made.score_samples)):
        _assert_raises(f"{name}.{method}", lambda call=call: call(X), what, pattern, errors)


def _assert_raises(name, call, what, pattern, errors):
    expected = " or ".join(error.__name__ for error in errors)
    said = None
    try:
        call()
    except errors as error:
        said = str(error)
    except Exception as error:
        raise AssertionError(f"{name} with {what} raises {type(error).__name__}: {expected} is expected.") from error
    assert said is not None, f"{name} accepts {what}: {expected} is expected."
    assert re.search(pattern, said, re.IGNORECASE), (
        f"{name} does not explain what is wrong with {what}: {said!r} does not match {pattern!r}."
    )


@image_check
def check_pixels_must_be_finite(name, detector):
    for value in (np.nan, np.inf):
        X = train_images() / 255
        X[3, 4, 5, 1] = value
        _assert_explained(name, detector, X, f"{value} among the pixels", "nan|inf|finite")


@image_check
def check_no_images(name, detector):
    _assert_explained(name, detector, [], "an empty list", "empty|at least|no image|0 image|0 sample|minimum")


@image_check
def check_number_of_channels(name, detector):
    X = np.zeros((24, 64, 64, 5), dtype=np.uint8)
    _assert_explained(name, detector, X, "images of 5 channels", r"channel|\bshape")


@image_check
def check_number_of_axes(name, detector):
    X = np.zeros((24, 2, 64, 64, 3), dtype=np.uint8)
    _assert_explained(name, detector, X, "an array of 5 axes", r"\bshape|\bdim|axes")


@image_check
def check_truncated_file(name, detector):
    """The error names the file."""
    with tempfile.TemporaryDirectory() as folder:
        paths = save_all(folder, train_images())
        content = Path(paths[5]).read_bytes()
        Path(paths[5]).write_bytes(content[: len(content) // 2])
        _assert_explained(
            name, detector, paths, "a truncated PNG file, image5.png", r"image5\.png", (ValueError, OSError)
        )


@image_check
def check_folder_in_place_of_file(name, detector):
    """The error names the folder."""
    with tempfile.TemporaryDirectory() as folder:
        paths = save_all(folder, new_images())
        inner = Path(folder) / "more-images"
        inner.mkdir()
        errors = (ValueError, TypeError, OSError)
        _assert_explained(name, detector, [*paths, str(inner)], "the folder more-images", "more-images", errors)


@image_check
def check_labels_must_match_images(name, detector):
    """y has one label for each image, and not only -1."""
    for y, what, pattern in (
        (np.ones(5), "5 labels for 24 images", r"\by\b|label|length|sample|\bshape"),
        (-np.ones(24), "y = -1 for every image", "-1|normal|inlier|outlier"),
    ):
        call = lambda y=y: unfitted(detector).fit(train_images(), y)  # noqa: E731
        _assert_raises(f"{name}.fit", call, what, pattern, (ValueError,))
