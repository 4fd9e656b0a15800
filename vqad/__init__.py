"""Image anomaly detection with scikit-learn estimators: one model, many kinds of object."""

from importlib.metadata import PackageNotFoundError, version

from vqad.features import BackboneFeatures
from vqad.hvq_trans import HVQTransDetector

try:
    __version__ = version("vqad")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["BackboneFeatures", "HVQTransDetector", "__version__"]
