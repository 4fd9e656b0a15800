"""What all displays need: the detector behind an estimator, and matplotlib."""

from __future__ import annotations

from typing import Any

from vqad.base import BaseImageDetector
from vqad.model_selection import unwrapped


def detector_and_images(display: type, estimator: Any, X: Any = None) -> tuple[BaseImageDetector, Any]:
    """The detector at the end of a pipeline or a search, and X as it comes to it."""
    detector, X = unwrapped(estimator, X)
    if not isinstance(detector, BaseImageDetector):
        instead = " from_predictions takes the scores or maps of any detector."
        raise TypeError(
            f"{display.__name__}.from_estimator takes a detector of vqad; got {type(detector).__name__}."
            + (instead if hasattr(display, "from_predictions") else "")
        )
    return detector, X


def pyplot_for(display: type) -> Any:
    """pyplot, imported when something is drawn."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(f"{display.__name__} needs matplotlib: pip install vqad[report], or matplotlib.") from error
    return pyplot
