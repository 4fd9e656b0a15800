"""Metrics of anomaly scores and anomaly maps.

Labels are those of scikit-learn's outlier detectors: +1 normal, -1 anomaly. Scores and maps are higher where more
anomalous: for a detector, ``-detector.score_samples(X)`` and ``detector.anomaly_map(X)``. All metrics are exact:
nothing is binned or subsampled, and ties are handled as one threshold.
"""

from vqad.metrics._compare import Comparison, compare
from vqad.metrics._evaluation import Evaluation, evaluate
from vqad.metrics._image import bootstrap_interval, image_auroc, image_average_precision, image_f1_max
from vqad.metrics._pimo import aupimo
from vqad.metrics._pixel import aupro, pixel_auroc, pixel_average_precision, pixel_f1_max

__all__ = [
    "Comparison",
    "Evaluation",
    "aupimo",
    "aupro",
    "bootstrap_interval",
    "compare",
    "evaluate",
    "image_auroc",
    "image_average_precision",
    "image_f1_max",
    "pixel_auroc",
    "pixel_average_precision",
    "pixel_f1_max",
]
