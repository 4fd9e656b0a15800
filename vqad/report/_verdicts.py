"""Verdicts of a detector, of images that can be shown."""

from __future__ import annotations

from typing import Any

from vqad.base import BaseImageDetector
from vqad.verdicts import Verdicts, sequence_of


def judge(detector: BaseImageDetector, images: Any, rows: Any = None) -> Verdicts:
    """Score images, label them, infer their categories and map them, all in one pass of the backbone.

    Each of the detector's methods makes a pass of its own; the numbers are the same.

    Parameters
    ----------
    detector : fitted detector
    images : images
        Any of the forms that the detector takes.
    rows : array-like of int, default=None
        Which of the images; None: all.

    Returns
    -------
    Verdicts
    """
    return detector.judge(sequence_of(detector, images), rows=rows)
