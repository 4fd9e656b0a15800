"""Image anomaly detection with scikit-learn estimators: one model, many kinds of object."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vqad.export import export_onnx
    from vqad.features import BackboneFeatures
    from vqad.hvq_trans import HVQTransDetector
    from vqad.persistence import load, save
    from vqad.vq_flow import VQFlowDetector

try:
    __version__ = version("vqad")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "BackboneFeatures",
    "HVQTransDetector",
    "VQFlowDetector",
    "__version__",
    "export_onnx",
    "load",
    "save",
]

_HOMES = {
    "BackboneFeatures": "features",
    "HVQTransDetector": "hvq_trans",
    "VQFlowDetector": "vq_flow",
    "export_onnx": "export",
    "load": "persistence",
    "save": "persistence",
}
_PARTS = (
    "datasets", "display", "distributed", "explain", "metrics", "model_selection", "nn", "prototypes", "report",
    "testing",
)  # fmt: skip


def __getattr__(name):
    """Import what is asked for: torch takes seconds, and some parts need libraries that not everybody has."""
    if name in _HOMES:
        found = getattr(import_module(f"vqad.{_HOMES[name]}"), name)
        globals()[name] = found
        return found
    if name in _PARTS:
        return import_module(f"vqad.{name}")
    raise AttributeError(f"module 'vqad' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__, *_PARTS})
