"""Image anomaly detection with scikit-learn estimators: one model, many kinds of object."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

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

_PARTS = ("datasets", "display", "explain", "metrics", "model_selection", "nn", "prototypes", "report", "testing")


def __getattr__(name):
    """Import a part when it is asked for: some need libraries that not everybody has."""
    if name in _PARTS:
        return import_module(f"vqad.{name}")
    raise AttributeError(f"module 'vqad' has no attribute {name!r}")


def __dir__():
    return [*globals(), *_PARTS]
