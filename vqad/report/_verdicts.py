"""Everything that is said of an image, from one pass over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqad.base import BaseImageDetector, resize_map
from vqad.images import ImageSequence, check_images


@dataclass(frozen=True)
class Verdicts:
    """What a detector says of some images.

    Attributes
    ----------
    score : ndarray of shape (n,), float
        Higher is more anomalous: ``-score_samples``.
    threshold : ndarray of shape (n,), float
        Scores over this are anomalous; it differs between images only with one threshold a category.
    p_value : ndarray of shape (n,), float
        Conformal p-value of "this image is normal", in (0, 1].
    label : ndarray of shape (n,), int
        +1 normal, -1 anomaly.
    category : ndarray of shape (n,)
        The category that each image was judged as.
    grids : ndarray of shape (n, h, w), float32
        Anomaly maps on the grid of the features.
    """

    score: NDArray[Any]
    threshold: NDArray[Any]
    p_value: NDArray[Any]
    label: NDArray[Any]
    category: NDArray[Any]
    grids: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.score)

    def anomaly_map(self, i: int, size: tuple[int, int]) -> NDArray[np.float32]:
        """Anomaly map of image `i` at `size` (height, width); higher is more anomalous."""
        return resize_map(self.grids[i], size)


def judge(detector: BaseImageDetector, images: Any, rows: Any = None) -> Verdicts:
    """Score images, label them, infer their categories and map them, all in one pass of the backbone.

    Each of the detector's methods makes a pass of its own; the numbers are the same.

    Parameters
    ----------
    detector : fitted detector
    images : images
        Any of the forms that the detector takes.
    rows : array-like of int, default=None
        Which of the images; None: all.

    Returns
    -------
    Verdicts
    """
    detector = detector._fitted()
    data = sequence_of(detector, images)
    judged = detector._judge_data(data, np.arange(len(data)) if rows is None else np.asarray(rows))
    threshold = np.broadcast_to(-np.asarray(detector._offset_of(judged.category)), judged.score.shape)
    return Verdicts(
        score=judged.score,
        threshold=threshold,
        p_value=detector.conformal_.p_values(judged.score, judged.category),
        # The detector's own arithmetic, so that no image on the very threshold is labelled otherwise.
        label=np.where(-judged.score + threshold < 0, -1, 1),
        category=detector.categories_[judged.category],
        grids=judged.maps,
    )


def sequence_of(detector: BaseImageDetector, images: Any) -> ImageSequence:
    """Wrap images for reading; raise ValueError for a detector whose X is features."""
    if isinstance(images, ImageSequence):
        return images
    if detector.backbone is None:
        raise ValueError(
            "The detector was fitted on features (backbone=None), so there are no images to show; "
            "fit one with a backbone."
        )
    shape = None if detector.image_shape is None else tuple(detector.image_shape)
    return check_images(images, image_shape=shape)
