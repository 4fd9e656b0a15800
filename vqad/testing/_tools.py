"""What the checks share: their list, their images, fitting, and when two results are the same."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.base import clone

from vqad.datasets import make_textured_parts

# Two results are the same when they differ by at most this share of the range of the values.
TOLERANCE = 1e-5
SCORING = ("score_samples", "decision_function", "predict")
OPTIONAL = ("anomaly_map", "predict_category")

CHECKS: list[tuple[Callable[[str, Any], None], Callable[[Any], bool]]] = []


def image_check(check=None, *, applies=lambda detector: True):
    """Put a check on the list: a function of the detector's name and the detector.

    Warnings are not shown while it runs: that 24 images are few is no failure.
    """
    if check is None:
        return lambda check: image_check(check, applies=applies)

    @wraps(check)
    def quiet(name, detector):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(name, detector)

    CHECKS.append((quiet, applies))
    return quiet


def has_maps(detector) -> bool:
    return hasattr(detector, "anomaly_map")


def methods_of(detector) -> list[str]:
    """Methods of images that the detector has, of those in the contract."""
    return [*SCORING, *(method for method in OPTIONAL if hasattr(detector, method))]


@cache
def _parts():
    return make_textured_parts(32, 0, categories=("disc", "weave"), image_size=64, random_state=0)


def train_images() -> np.ndarray:
    """24 normal images of two kinds, in turn: (24, 64, 64, 3), uint8."""
    return _parts().images[:24].copy()


def train_labels() -> np.ndarray:
    return _parts().category[:24].copy()


def new_images() -> np.ndarray:
    """8 further normal images: (8, 64, 64, 3), uint8."""
    return _parts().images[24:].copy()


def crude_defects() -> tuple[np.ndarray, np.ndarray]:
    """The new images with a bright chequered square over a sixth of each, and the squares as masks."""
    images, masks = new_images(), np.zeros((8, 64, 64), dtype=bool)
    row, column = np.mgrid[:26, :26] // 4
    square = np.where(((row + column) % 2 == 0)[..., None], (255, 0, 255), (255, 255, 0))
    for i, (image, mask) in enumerate(zip(images, masks)):
        top, left = 6 + 2 * i, 30 - 2 * i
        image[top : top + 26, left : left + 26] = square
        mask[top : top + 26, left : left + 26] = True
    return images, masks


def save_all(folder: str, images) -> list[str]:
    """Write images as PNG files."""
    paths = [str(Path(folder) / f"image{i}.png") for i in range(len(images))]
    for path, image in zip(paths, images):
        Image.fromarray(image).save(path)
    return paths


def unfitted(detector, **parameters):
    """Clone the detector, with every random state in it set to 0."""
    made = clone(detector)
    states = {key: 0 for key in made.get_params() if key == "random_state" or key.endswith("__random_state")}
    return made.set_params(**states, **parameters)


def fitted(detector, X=None, y=None, **parameters):
    """Clone, seed and fit; on the training images if no others are given."""
    made = unfitted(detector, **parameters)
    made.fit(train_images() if X is None else X, y)
    return made


def outputs(detector, X) -> dict[str, list]:
    """Score of every image, and its map if the detector gives maps."""
    found = {"score_samples": list(detector.score_samples(X))}
    if has_maps(detector):
        found["anomaly_map"] = list(detector.anomaly_map(X))
    return found


def assert_same(name: str, actual: dict[str, list], expected: dict[str, list], when: str) -> None:
    """Assert that two `outputs` are the same."""
    for method, values in expected.items():
        got = np.concatenate([np.ravel(v).astype(float) for v in actual[method]])
        want = np.concatenate([np.ravel(v).astype(float) for v in values])
        assert got.shape == want.shape, f"{name}.{method} gives {got.size} values in place of {want.size} {when}."
        span = np.ptp(want) or np.abs(want).max()
        difference = np.abs(got - want).max()
        assert difference <= TOLERANCE * span, (  # also false for nan
            f"{name}.{method} gives other values {when}: they differ by up to {difference:.3g}, "
            f"in a range of {span:.3g}."
        )


def loaded_torch():
    """Torch if the detector, or anything else, has imported it."""
    return sys.modules.get("torch")


def has_cuda() -> bool:
    torch = loaded_torch()
    return torch is not None and torch.cuda.is_available()
