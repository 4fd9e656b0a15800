"""Verdicts: all results for some images, from one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from vqad.fitted import Fitted
from vqad.images import ImageSequence, check_images
from vqad.scoring import Judgement


@dataclass(frozen=True)
class Verdicts:
    """A detector's results for some images.

    Attributes
    ----------
    score : ndarray of shape (n,), float
        Higher is more anomalous: ``-score_samples``.
    threshold : ndarray of shape (n,), float
        Scores above it are anomalous; it differs between images only with ``threshold="category"``.
    p_value : ndarray of shape (n,), float
        Conformal p-value of "this image is normal", in (0, 1].
    label : ndarray of shape (n,), int
        +1 normal, -1 anomaly.
    category : ndarray of shape (n,)
        The category that each image was judged as.
    grids : ndarray of shape (n, h, w), float32, or list of ndarray of shape (h, w)
        Anomaly maps on the grid of the features; a list if maps of images in tiles differ in size.
    hidden : callable or None
        Returns the mask of what is ignored in an image, or None, from the image's number and a size.
    """

    score: NDArray[Any]
    threshold: NDArray[Any]
    p_value: NDArray[Any]
    label: NDArray[Any]
    category: NDArray[Any]
    grids: NDArray[np.float32] | list[NDArray[np.float32]]
    hidden: Callable[[int, tuple[int, int]], NDArray[np.bool_] | None] | None = None

    def __len__(self) -> int:
        return len(self.score)

    def anomaly_map(self, i: int, size: tuple[int, int]) -> NDArray[np.float32]:
        """Anomaly map of image `i` at `size` (height, width); higher is more anomalous."""
        return resize_map(self.grids[i], size, None if self.hidden is None else self.hidden(i, size))


def verdicts_of(fitted: Fitted, judged: Judgement, hidden: Any = None) -> Verdicts:
    """Apply thresholds and p-values to scores and categories."""
    threshold = np.broadcast_to(-np.asarray(fitted.thresholds.offset_of(judged.category)), judged.score.shape)
    return Verdicts(
        score=judged.score,
        threshold=threshold,
        p_value=fitted.thresholds.conformal.p_values(judged.score, judged.category),
        label=np.where(threshold - judged.score >= 0, 1, -1),
        category=fitted.categories[judged.category],
        grids=judged.maps,
        hidden=hidden,
    )


def resize_map(grid_map: np.ndarray, size: tuple[int, int], hidden: np.ndarray | None = None) -> np.ndarray:
    """Resize a map (h, w) bilinearly to ``size``; 0 where ``hidden``."""
    if grid_map.shape != tuple(size):
        tensor = torch.from_numpy(grid_map)[None, None]
        grid_map = F.interpolate(tensor, tuple(size), mode="bilinear", align_corners=True)[0, 0].numpy()
    return grid_map if hidden is None else np.where(hidden, np.float32(0), grid_map)


def sequence_of(detector: Any, images: Any) -> ImageSequence:
    """Wrap images for reading; raise ValueError for a detector whose X is features."""
    if isinstance(images, ImageSequence):
        return images
    if detector.backbone is None:
        raise ValueError(
            "The detector was fitted on features (backbone=None), so it takes no images: fit one with a backbone."
        )
    shape = None if detector.image_shape is None else tuple(detector.image_shape)
    return check_images(images, image_shape=shape)
