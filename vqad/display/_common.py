"""Helpers of all displays: the detector inside an estimator, and matplotlib."""

from __future__ import annotations

from typing import Any

from vqad.base import BaseImageDetector
from vqad.model_selection import unwrapped


def detector_and_images(display: type, estimator: Any, X: Any = None) -> tuple[BaseImageDetector, Any]:
    """The detector in a pipeline or a search, and X as it arrives there."""
    detector, X = unwrapped(estimator, X)
    if not isinstance(detector, BaseImageDetector):
        instead = " For other detectors pass their scores or maps to from_predictions."
        raise TypeError(
            f"{display.__name__}.from_estimator needs a detector of vqad; got {type(detector).__name__}."
            + (instead if hasattr(display, "from_predictions") else "")
        )
    return detector, X


def pyplot_for(display: type) -> Any:
    """Import pyplot, which is needed only to plot."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(f"{display.__name__} needs matplotlib: pip install vqad[report], or matplotlib.") from error
    return pyplot
