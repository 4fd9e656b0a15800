"""An anomaly map drawn over its image."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy import ndimage

from vqad._decode import to_unit_range

# Colours run from 0 to this many map thresholds for all images, so that overlays are comparable.
SCALE_TOP = 2.0
# Opacity of the colour at 0, and from the threshold.
OPACITY = (0.0, 0.6)
# Lightness decreases monotonically, so that the scale can be read in grey and by the colour blind.
_HEAT = np.array([[255, 255, 204], [254, 217, 118], [253, 141, 60], [227, 26, 28], [128, 0, 38]], dtype=float)
_CONTOUR = np.array([0, 229, 255], dtype=float)
_GREY = np.array([0.299, 0.587, 0.114])
# Number of colours in a layer: few enough for a small file, enough that steps are not visible.
_LAYER_LEVELS = 48


def heat_colours(level: ArrayLike) -> NDArray[np.float64]:
    """Colour of a level: 0 is pale yellow, 0.5 orange (the threshold), 1 dark red.

    Parameters
    ----------
    level : array-like of float
        Values outside 0..1 are clipped.

    Returns
    -------
    ndarray of shape (..., 3), float
        Red, green, blue in 0..255.
    """
    position = np.clip(np.asarray(level, dtype=float), 0, 1) * (len(_HEAT) - 1)
    anchors = np.arange(len(_HEAT))
    return np.stack([np.interp(position, anchors, _HEAT[:, k]) for k in range(3)], axis=-1)


def overlay(image: ArrayLike, anomaly_map: ArrayLike, threshold: float) -> NDArray[np.uint8]:
    """Draw an anomaly map over a grey version of its image, with a line around areas above the threshold.

    Parameters
    ----------
    image : array-like of shape (H, W) or (H, W, C) with C = 1, 3 or 4, unsigned integers, or float in 0..1
        Alpha is dropped.
    anomaly_map : array-like of shape (H, W)
        Higher is more anomalous.
    threshold : float
        The detector's ``map_threshold_``. Colours run from 0 (transparent) over the threshold (orange) to twice the
        threshold (dark red). The scale is fixed, so that overlays of different images are comparable.

    Returns
    -------
    ndarray of shape (H, W, 3), uint8

    Raises
    ------
    ValueError
        If image and map differ in height or width or have a wrong number of axes, or floats are not in 0..1.
    """
    heat = np.asarray(anomaly_map, dtype=float)
    grey = _grey(np.asarray(image))
    if heat.ndim != 2 or heat.shape != grey.shape:
        raise ValueError(
            f"anomaly_map must have the height and width of the image, {grey.shape}; got shape {heat.shape}."
        )
    level = np.clip(heat / (SCALE_TOP * max(float(threshold), 1e-6)), 0, 1)
    share = np.interp(level, [0, 1 / SCALE_TOP], OPACITY)[..., None]
    mixed = (1 - share) * grey[..., None] + share * heat_colours(level)
    mixed[_outline(heat > threshold)] = _CONTOUR
    return np.rint(mixed).astype(np.uint8)


def heat_layer(anomaly_map: NDArray[Any], threshold: float) -> bytes:
    """Draw an anomaly map as `overlay` does, as a transparent PNG to lay over a grey image.

    Parameters
    ----------
    anomaly_map : ndarray of shape (H, W)
        Higher is more anomalous.
    threshold : float
        The detector's ``map_threshold_``.

    Returns
    -------
    bytes
        A PNG file of H x W pixels with a palette.
    """
    level = np.linspace(0, 1, _LAYER_LEVELS)
    colours = np.vstack([heat_colours(level), _CONTOUR])
    opacity = np.append(np.interp(level, [0, 1 / SCALE_TOP], OPACITY), 1.0)
    relative = np.clip(anomaly_map / (SCALE_TOP * max(float(threshold), 1e-6)), 0, 1)
    index = np.rint(relative * (_LAYER_LEVELS - 1)).astype(np.uint8)
    index[_outline(anomaly_map > threshold)] = _LAYER_LEVELS
    image = Image.fromarray(index, mode="P")
    image.putpalette(np.rint(colours).astype(np.uint8).tobytes())
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True, transparency=np.rint(255 * opacity).astype(np.uint8).tobytes())
    return out.getvalue()


def _grey(image: NDArray[Any]) -> NDArray[np.float64]:
    """Lightness (H, W) in 0..255."""
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4):
        raise ValueError(f"image must have shape (H, W) or (H, W, C) with C = 1, 3 or 4; got {image.shape}.")
    image = image[..., :3]
    pixels = image.astype(float) if image.dtype == np.uint8 else 255.0 * to_unit_range(image, "image").astype(float)
    return pixels[..., 0] if image.shape[2] == 1 else pixels @ _GREY


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of a mask along its border; the edge of the image is not a border."""
    thickness = max(1, round(min(mask.shape) / 110))
    inside: NDArray[np.bool_] = ndimage.binary_erosion(mask, iterations=thickness, border_value=1)
    return mask & ~inside
