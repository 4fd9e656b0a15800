"""Opening models for the command, and printing their thresholds."""

from __future__ import annotations

import argparse

import numpy as np

import vqad
from vqad.base import BaseImageDetector


def loaded(arguments: argparse.Namespace) -> BaseImageDetector:
    """The model, set to the device asked for rather than the one that it was fitted on."""
    detector: BaseImageDetector = vqad.load(arguments.model)
    detector.set_params(device=arguments.device)
    return detector


def thresholds_of(detector: BaseImageDetector) -> str:
    values = [f"{-value:.3f}" for value in np.atleast_1d(detector.offset_)]
    if len(values) > 1:
        values = [f"{name} {value}" for name, value in zip(detector.categories_, values)]
    return ", ".join(values)
