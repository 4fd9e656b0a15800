"""FeatureCache: feature maps on disk, keyed by the content of each image."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import torch
from sklearn.utils.validation import check_memory
from torch import Tensor

from vqad._warn import warn

# Entry of one image: torch's name of the dtype, since numpy has no bfloat16, the arrays, and a checksum.
Kept = tuple[str, list[np.ndarray], int]


class FeatureCache:
    """Feature maps of images in a joblib cache, one entry per image.

    The key of an image is its digest: of a file, the digest of its bytes, wherever it lies; of an array, tensor or PIL
    image, the digest of its pixels. So a file and its pixels are two entries. Entries are written atomically, so
    processes may share the folder.

    Parameters
    ----------
    memory : str, path or joblib.Memory
        As in scikit-learn's `Pipeline`.
    source : str
        Digest of everything else that features depend on: backbone, options, precision, device.

    Raises
    ------
    OSError
        When ``memory`` is not a folder and cannot be created.
    """

    def __init__(self, memory, source: str):
        memory = memory if hasattr(memory, "cache") else str(memory)
        try:
            self._cached = check_memory(memory).cache(_feature_maps, ignore=["make"])
        except OSError as error:
            raise type(error)(f"memory={memory!r} must be a folder, or the path of a new one: {error}.") from error
        self.source, self.memory, self._failed = source, getattr(memory, "location", memory), False

    def find(self, image: str) -> list[Tensor] | None:
        """Maps (C, h, w) of the image with the digest ``image``, or None."""
        if not self._cached.check_call_in_cache(image, self.source, _missing):
            return None
        try:
            name, arrays, checksum = self._cached(image, self.source, _missing)
        except (_Missing, ValueError):  # damaged, so that joblib calls `_missing`; or of another version
            return None
        return _to_tensors(name, arrays) if checksum == _checksum(arrays) else None

    def keep(self, image: str, maps: list[Tensor]) -> None:
        """Write the maps (C, h, w) of the image with the digest ``image``."""
        self._cached.call(image, self.source, lambda: _to_arrays(maps))  # also over a damaged entry
        # On a full disk joblib continues, with a warning that does not name the folder.
        if not self._failed and not self._cached.check_call_in_cache(image, self.source, _missing):
            self._failed = True
            warn(f"memory={self.memory!r} cannot store features; is the disk full? They are recomputed each time.")


def _feature_maps(image: str, source: str, make: Callable[[], Kept]) -> Kept:
    return make()


class _Missing(Exception):
    pass


def _missing() -> Kept:
    raise _Missing


def _to_arrays(maps: list[Tensor]) -> Kept:
    dtype = maps[0].dtype
    kept = [m.cpu().view(torch.int16) if dtype == torch.bfloat16 else m.cpu() for m in maps]
    arrays = [m.contiguous().numpy() for m in kept]
    return str(dtype).removeprefix("torch."), arrays, _checksum(arrays)


def _checksum(arrays: list[np.ndarray]) -> int:
    """CRC-32 of shapes and values."""
    checksum = 0
    for array in arrays:
        checksum = zlib.crc32(
            np.ascontiguousarray(array).view(np.uint8), zlib.crc32(repr(array.shape).encode(), checksum)
        )
    return checksum


def _to_tensors(name: str, arrays: list[np.ndarray]) -> list[Tensor]:
    maps = [torch.from_numpy(np.array(array)) for array in arrays]  # a copy: joblib may give read-only memory maps
    return [m.view(torch.bfloat16) for m in maps] if name == "bfloat16" else maps
