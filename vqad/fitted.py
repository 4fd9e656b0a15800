"""Fitted: all that a detector has learned, in one thing that does not change."""

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
    """What happened in training.

    Attributes
    ----------
    loss_curve, validation_curve : tuple of float
        After every pass of all trainings.
    log : TrainingLog
        The last training.
    """

    loss_curve: tuple[float, ...] = ()
    validation_curve: tuple[float, ...] = ()
    log: TrainingLog = field(default_factory=TrainingLog)

    def append(self, log: TrainingLog) -> History:
        """This and another training."""
        curves = (*self.loss_curve, *log.loss_curve), (*self.validation_curve, *log.validation_curve)
        return History(*curves, log)


@dataclass(frozen=True, eq=False)
class Fitted:
    """What was learned.

    Attributes
    ----------
    features : BackboneFeatures, transformer or None
        The backbone, fitted; None of features that came ready.
    map_shape : tuple of int or None
        What a caller's own transformer gives for every image, (1, h, w, C), or ready-made features are, (h, w, C).
    ignore : ndarray of shape (h, w), bool, or None
        What is not looked at of any image.
    tiles : (int, int) or None
        Size and overlap of the tiles that images are learned and judged by; None where each is seen as a whole.
    categories : ndarray of shape (n_categories,)
        Labels.
    scorer : Scorer
    held_out : HeldOut
    seen : Seen
    thresholds : Thresholds
    prototypes : Prototypes
    history : History
    n_images : int
        Normal images given, held-out ones among them.
    seed : int
        Of the split into training and held-out images.
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
