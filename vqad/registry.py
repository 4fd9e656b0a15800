"""The detectors that there are, by name: the one place where the command, the demonstration and files find them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vqad.base import BaseImageDetector

_DETECTORS: dict[str, str | type[BaseImageDetector]] = {
    "hvq-trans": "vqad.hvq_trans.HVQTransDetector",
    "vq-flow": "vqad.vq_flow.VQFlowDetector",
}


def names() -> list[str]:
    """Names of the detectors; nothing is imported."""
    return list(_DETECTORS)


def detector_class(name: str) -> type[BaseImageDetector]:
    """The detector of a name."""
    found = _DETECTORS[name]
    if isinstance(found, str):
        module, _, attribute = found.rpartition(".")
        found = _DETECTORS[name] = getattr(import_module(module), attribute)
    return found


def detector_classes() -> list[type[BaseImageDetector]]:
    """All detectors."""
    return [detector_class(name) for name in names()]


def register(name: str, detector: type[BaseImageDetector]) -> None:
    """Let the command, model files and ONNX export know a detector.

    Parameters
    ----------
    name : str
        As the command is to call it.
    detector : type
        A `BaseImageDetector`. Programs that open its files must register it too.
    """
    _DETECTORS[name] = detector
