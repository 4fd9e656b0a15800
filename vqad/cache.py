"""FeatureCache: the feature maps of each image on disk, found again by what is on the image."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import torch
from sklearn.utils.validation import check_memory
from torch import Tensor

from vqad._warn import warn

# What joblib keeps of one image: the arrays, torch's name of their type, since numpy has no bfloat16, and a checksum.
Kept = tuple[str, list[np.ndarray], int]


class FeatureCache:
    """Feature maps of images in a joblib cache, one entry an image.

    The key of an image is its digest, the same in every fit, fold and process: of a file that of its bytes, wherever it
    lies; of an array, tensor or PIL image that of its pixels. So a file and its pixels are two entries. Entries are
    written in one piece, so processes may share the folder.

    Parameters
    ----------
    memory : str, path or joblib.Memory
        As in scikit-learn's `Pipeline`. OSError if it is no folder and none can be made there.
    source : str
        Digest of all that features depend on beside the image: backbone, options, precision, device.
    """

    def __init__(self, memory, source: str):
        memory = memory if hasattr(memory, "cache") else str(memory)
        try:
            self._cached = check_memory(memory).cache(_feature_maps, ignore=["make"])
        except OSError as error:
            raise type(error)(f"memory={memory!r} must be a folder, or the path of one to be made: {error}.") from error
        self.source, self.memory, self._failed = source, getattr(memory, "location", memory), False

    def find(self, image: str) -> list[Tensor] | None:
        """Maps (C, h, w) of the image with the digest ``image``, or None."""
        if not self._cached.check_call_in_cache(image, self.source, _missing):
            return None
        try:
            name, arrays, checksum = self._cached(image, self.source, _missing)
        except (_Missing, ValueError):  # there, but damaged: joblib warns and asks for it anew; or of another version
            return None
        return _to_tensors(name, arrays) if checksum == _checksum(arrays) else None

    def keep(self, image: str, maps: list[Tensor]) -> None:
        """Write the maps (C, h, w) of the image with the digest ``image``."""
        self._cached.call(image, self.source, lambda: _to_arrays(maps))  # also over a damaged entry
        # Where the disk is full joblib goes on, with a warning that does not say where.
        if not self._failed and not self._cached.check_call_in_cache(image, self.source, _missing):
            self._failed = True
            warn(f"memory={self.memory!r} cannot keep features: is the disk full? They are computed anew each time.")


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
