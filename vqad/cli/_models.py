"""Models that the command opens, and how it tells of their thresholds."""

from __future__ import annotations

import argparse

import numpy as np

import vqad
from vqad.base import BaseImageDetector


def loaded(arguments: argparse.Namespace) -> BaseImageDetector:
    """The model, to work on the device of this machine that was asked for, not on the one it was fitted on."""
    detector: BaseImageDetector = vqad.load(arguments.model)
    detector.set_params(device=arguments.device)
    return detector


def thresholds_of(detector: BaseImageDetector) -> str:
    values = [f"{-value:.3f}" for value in np.atleast_1d(detector.offset_)]
    if len(values) > 1:
        values = [f"{name} {value}" for name, value in zip(detector.categories_, values)]
    return ", ".join(values)
