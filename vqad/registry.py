"""The detectors by name, for the command, the demonstration and model files."""

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
    """Names of the detectors; imports none of them."""
    return list(_DETECTORS)


def detector_class(name: str) -> type[BaseImageDetector]:
    """The class of a detector, imported when needed.

    Parameters
    ----------
    name : str

    Returns
    -------
    type

    Raises
    ------
    KeyError
        When there is no detector of that name.
    """
    found = _DETECTORS[name]
    if isinstance(found, str):
        module, _, attribute = found.rpartition(".")
        found = _DETECTORS[name] = getattr(import_module(module), attribute)
    return found


def detector_classes() -> list[type[BaseImageDetector]]:
    """The classes of all detectors."""
    return [detector_class(name) for name in names()]


def register(name: str, detector: type[BaseImageDetector]) -> None:
    """Register a detector for the command, model files and ONNX export.

    Parameters
    ----------
    name : str
        Name of the detector on the command line; replaces a detector of the same name.
    detector : type
        A subclass of `BaseImageDetector`. Programs that open its model files must register it too.
    """
    _DETECTORS[name] = detector
