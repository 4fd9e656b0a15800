"""Verdicts of a detector on images that can be shown."""

from __future__ import annotations

from typing import Any

from vqad.base import BaseImageDetector
from vqad.verdicts import Verdicts, sequence_of


def judge(detector: BaseImageDetector, images: Any, rows: Any = None) -> Verdicts:
    """Compute scores, labels, categories and maps of images in a single pass through the backbone.

    The detector's methods return the same results, but each makes its own pass.

    Parameters
    ----------
    detector : fitted detector
    images : images
        In any form that the detector takes.
    rows : array-like of int, default=None
        Indices of the images to judge; None: all.

    Returns
    -------
    Verdicts
    """
    return detector.judge(sequence_of(detector, images), rows=rows)
