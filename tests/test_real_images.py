"""The main job on photographs of real products, small: several categories in one model, categories not told at scoring.

The images are not part of the project. The tests look for a folder in MVTec layout with the categories `bottle` and
`magnetic_tile`, named by the environment variable VQAD_TEST_DATA or lying beside the checkout, and skip without it.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from vqad import HVQTransDetector
from vqad.datasets import load_mvtec
from vqad.metrics import evaluate

DATA = Path(os.environ.get("VQAD_TEST_DATA") or Path(__file__).parents[1].parent / "shared" / "data")
CATEGORIES = ["bottle", "magnetic_tile"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all((DATA / name / "train" / "good").is_dir() for name in CATEGORIES),
        reason=f"NO REAL IMAGES: set VQAD_TEST_DATA to a folder in MVTec layout with {CATEGORIES} (looked in {DATA})",
    ),
]


def spread(dataset, n):
    """About n images of each category, evenly spread over it."""
    rows = [np.flatnonzero(dataset.category == name) for name in CATEGORIES]
    return dataset[np.concatenate([own[np.linspace(0, len(own) - 1, min(n, len(own))).astype(int)] for own in rows])]


@pytest.fixture(scope="module")
def fitted():
    train = spread(load_mvtec(DATA, categories=CATEGORIES), 60)
    detector = HVQTransDetector(
        image_size=160, d_model=64, n_codes=128, max_iter=6, false_alarm_rate=0.1, random_state=0
    )
    return detector.fit(train)


@pytest.fixture(scope="module")
def test_images():
    return spread(load_mvtec(DATA, categories=CATEGORIES, split="test"), 40)


def test_the_kinds_of_object_are_found_without_labels(fitted, test_images):
    assert len(fitted.categories_) == 2
    found = fitted.predict_category(test_images)
    owner = {c: test_images.category[found == c] for c in np.unique(found)}
    assert all(len(set(names)) == 1 for names in owner.values())
    assert len(owner) == 2


def test_defects_score_high_and_are_where_the_masks_say(fitted, test_images):
    result = evaluate(
        test_images.target,
        -fitted.score_samples(test_images),
        test_images.category,
        masks=test_images.masks(),
        maps=fitted.anomaly_map(test_images),
    )
    # Far below what a full fit reaches, far above chance.
    assert result.per_category["bottle"]["image_auroc"] > 0.95
    assert result.per_category["bottle"]["pixel_auroc"] > 0.9
    assert result.per_category["magnetic_tile"]["image_auroc"] > 0.6


def test_maps_have_the_size_of_their_images(fitted, test_images):
    some = test_images[::16]
    maps = fitted.anomaly_map(some)
    assert [m.shape for m in maps] == [image.shape[:2] for image in some]
