"""Shared tools of the checks: their list, images, fitting, and comparing results."""

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

# Results are equal if they differ by at most this share of the range of the values.
TOLERANCE = 1e-5
SCORING = ("score_samples", "decision_function", "predict")
OPTIONAL = ("anomaly_map", "predict_category")

CHECKS: list[tuple[Callable[[str, Any], None], Callable[[Any], bool]]] = []


def image_check(check=None, *, applies=lambda detector: True):
    """Register a check, a function of the detector's name and the detector.

    Warnings are suppressed while it runs: detectors may warn that 24 images are few.
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
    """Methods of the contract that take images and that the detector has."""
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
    """8 other normal images: (8, 64, 64, 3), uint8."""
    return _parts().images[24:].copy()


def crude_defects() -> tuple[np.ndarray, np.ndarray]:
    """The new images with a bright chequered square on a sixth of each, and the masks of the squares."""
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
    """Clone, seed and fit, by default on the training images."""
    made = unfitted(detector, **parameters)
    made.fit(train_images() if X is None else X, y)
    return made


def outputs(detector, X) -> dict[str, list]:
    """Score of each image, and its map if the detector has maps."""
    found = {"score_samples": list(detector.score_samples(X))}
    if has_maps(detector):
        found["anomaly_map"] = list(detector.anomaly_map(X))
    return found


def assert_same(name: str, actual: dict[str, list], expected: dict[str, list], when: str) -> None:
    """Assert that two `outputs` are equal."""
    for method, values in expected.items():
        got = np.concatenate([np.ravel(v).astype(float) for v in actual[method]])
        want = np.concatenate([np.ravel(v).astype(float) for v in values])
        assert got.shape == want.shape, f"{name}.{method} gives {got.size} values instead of {want.size} {when}."
        span = np.ptp(want) or np.abs(want).max()
        difference = np.abs(got - want).max()
        assert difference <= TOLERANCE * span, (  # also false for nan
            f"{name}.{method} gives other values {when}: they differ by up to {difference:.3g}, "
            f"in a range of {span:.3g}."
        )


def loaded_torch():
    """torch, if anything has imported it."""
    return sys.modules.get("torch")


def has_cuda() -> bool:
    torch = loaded_torch()
    return torch is not None and torch.cuda.is_available()
