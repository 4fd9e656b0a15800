"""Image anomaly detection with scikit-learn estimators: one model, many kinds of object."""

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
