"""Masks of what to ignore: parts of images that are neither learned nor judged."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqad._checks import is_missing
from vqad._decode import read_mask, said_of

# Pixel value that the backbone sees where an image is ignored.
GREY = 0.5


class Ignored:
    """Masks that are True where images are to be ignored.

    Parameters
    ----------
    one : ndarray of shape (h, w), bool, optional
        One mask for all images, stretched to the size of each.
    each : sequence of (ndarray of shape (H, W), path or None), optional
        A mask for each image, of its size; None ignores nothing.
    """

    def __init__(self, one: np.ndarray | None = None, each: Sequence[Any] | None = None) -> None:
        self.one, self.each = one, each

    def at(self, i: int, size: tuple[int, int], name: str) -> np.ndarray | None:
        """Mask of image ``i`` at its own size; None if nothing is ignored."""
        mask = None if self.one is None else stretched(self.one, size)
        own = self._own(i)
        if own is None:
            return mask
        if own.shape != tuple(size):
            raise ValueError(f"{said_of(name, 'has')} {size} pixels, but its mask of what to ignore has {own.shape}.")
        return own if mask is None else mask | own

    def seen(self, i: int, grid: tuple[int, int], name: str) -> Tensor:
        """Share of each cell of a grid that is not ignored, (1, rows, columns)."""
        own = self._own(i)
        if own is None:
            return torch.ones(1, *grid) if self.one is None else share_seen(self.one, grid)
        mask = self.at(i, own.shape, name)
        return share_seen(own if mask is None else mask, grid)

    def part(self, numbers: Sequence[int], one: bool = True) -> Ignored:
        """The masks of the images ``numbers``, in this order; without the mask for all images if not ``one``."""
        each = None if self.each is None else [self.each[i] for i in numbers]
        if each is not None:
            each = [os.path.abspath(mask) if isinstance(mask, (str, os.PathLike)) else mask for mask in each]
        return Ignored(self.one if one else None, each)

    def digest(self, i: int) -> str:
        """Digest of an image's masks; empty if nothing is ignored."""
        digest, masks = hashlib.sha256(), [self.one, self._own(i)]
        for mask in masks:
            digest.update(b"all" if mask is None else f"{mask.shape}".encode() + np.packbits(mask).tobytes())
        return "" if all(mask is None for mask in masks) else digest.hexdigest()

    def _own(self, i: int) -> np.ndarray | None:
        return None if self.each is None or self.each[i] is None else as_mask(self.each[i], f"mask {i} to ignore")


def as_mask(given: Any, name: str) -> np.ndarray:
    """A mask (H, W), bool, from an array or the path of an image.

    Raises
    ------
    ValueError
        When it is not a mask, or is True everywhere.
    """
    if isinstance(given, (str, os.PathLike)):
        mask = read_mask(os.fspath(given))
        name = f"{name}, {os.fspath(given)!r},"
    else:
        values = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)
        if values.ndim != 2 or values.dtype.kind not in "buif" or 0 in values.shape:
            raise ValueError(
                f"{name} must be an array (H, W) that is true, or not 0, where images are to be ignored, or the path "
                f"of an image that is black elsewhere; got shape {values.shape} and dtype {values.dtype}."
            )
        mask = values != 0
    if mask.all():
        raise ValueError(f"{name} covers the whole image: it must mark only the part to ignore.")
    return mask


def check_each(masks: Any, n: int) -> list[Any]:
    """One mask, path or None for each of ``n`` images."""
    given = list(masks)
    if len(given) != n:
        raise ValueError(f"there are {len(given)} masks to ignore for {n} images: give one mask or None for each.")
    return [None if mask is None or is_missing(mask) else mask for mask in given]


def stretched(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask at another size, by nearest neighbour."""
    if mask.shape == tuple(size):
        return mask
    rows, columns = (((np.arange(n) + 0.5) * k / n).astype(int) for n, k in zip(size, mask.shape))
    return mask[rows][:, columns]


def share_seen(mask: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """Share of each cell of a grid that a mask does not cover, (1, rows, columns); 0 only if it covers all of it."""
    seen = torch.from_numpy(~mask)[None].float()
    return F.interpolate(seen[None], grid, mode="area")[0]
