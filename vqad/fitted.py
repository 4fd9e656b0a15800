"""Fitted: the learned state of a detector, as one immutable object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vqad.calibration import HeldOut, Seen, Thresholds
from vqad.prototypes import Prototypes
from vqad.scoring import Scorer
from vqad.training_run import TrainingLog


@dataclass(frozen=True, eq=False)
class History:
    """History of training.

    Attributes
    ----------
    loss_curve, validation_curve : tuple of float
        Losses after each pass of all trainings.
    log : TrainingLog
        Log of the last training.
    """

    loss_curve: tuple[float, ...] = ()
    validation_curve: tuple[float, ...] = ()
    log: TrainingLog = field(default_factory=TrainingLog)

    def append(self, log: TrainingLog) -> History:
        """The history with another training appended."""
        curves = (*self.loss_curve, *log.loss_curve), (*self.validation_curve, *log.validation_curve)
        return History(*curves, log)


@dataclass(frozen=True, eq=False)
class Fitted:
    """The learned state of a detector.

    Attributes
    ----------
    features : BackboneFeatures, transformer or None
        The fitted backbone; None with ``backbone=None``.
    map_shape : tuple of int or None
        Shape of the output of a caller's own transformer for one image, (1, h, w, C), or of given features, (h, w, C).
    ignore : ndarray of shape (h, w), bool, or None
        Mask of what to ignore in all images.
    tiles : (int, int) or None
        Size and overlap of tiles; None if images are not cut.
    categories : ndarray of shape (n_categories,)
        Labels of the categories.
    scorer : Scorer
    held_out : HeldOut
    seen : Seen
    thresholds : Thresholds
    prototypes : Prototypes
    history : History
    n_images : int
        Number of normal images given, including held-out ones.
    seed : int
        Seed of the split into training and held-out images.
    """

    features: Any
    map_shape: tuple[int, ...] | None
    ignore: np.ndarray | None
    tiles: tuple[int, int] | None
    categories: np.ndarray
    scorer: Scorer
    held_out: HeldOut
    seen: Seen
    thresholds: Thresholds
    prototypes: Prototypes
    history: History
    n_images: int
    seed: int
