"""From the argument ``X`` to batches of pixels.

Every accepted form becomes an indexable of single images (arrays, tensors, PIL images or paths). From there all items
are processed in the same way: decoded, scaled to 0..1, given three channels, resized. So the form of an image, and the
other images in X, do not affect its pixels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from vqad._decode import (
    has_more_pages,
    is_narrowed,
    loaded,
    opened,
    pil_to_array,
    readable,
    said_of,
    tensor_to_array,
    to_unit_range,
    upright_size,
)
from vqad._forms import check_item, is_array, items_of
from vqad._ignore import GREY, Ignored, as_mask, check_each, stretched
from vqad._warn import warn

__all__ = ["ImageSequence", "check_images"]

# Pixels that are converted to float at a time while a large image is resized.
BAND_PIXELS = 2**20


def check_images(X: Any, *, image_shape: tuple[int, ...] | None = None) -> ImageSequence:
    """Check the form of ``X`` and wrap it. Pixels are read and checked only when they are needed.

    Parameters
    ----------
    X : array, tensor, list, tuple, Series or lazy collection
        One of

        - array or torch tensor of shape (n, H, W) or (n, H, W, C), with C = 1 (grey), 3 (RGB) or 4 (RGBA; alpha is
          dropped with a warning). Any object with numpy's ``shape``, ``dtype`` and indexing, such as a memmap or an
          HDF5 data set, is read image by image;
        - list, tuple or object array of single images of any sizes: arrays or tensors of shape (H, W) or (H, W, C),
          PIL images, file paths, the bytes of image files, or open image files;
        - array or pandas Series of file paths, or of bytes;
        - an object with a sequence of file paths as attribute ``paths``, such as `vqad.datasets.ImageDataset`;
        - any other object with ``len(X)`` and ``X[i]``, where ``X[i]`` is a single image in one of these forms, which
          is read each time it is needed;
        - rows (n, n_features) if `image_shape` is given.

        Unsigned integers are divided by their type's maximum, booleans are 0 and 1, floats must be in 0..1.
    image_shape : (H, W) or (H, W, C), default=None
        Shape of the images whose flattened pixels are the rows of a 2-D ``X``; not used for other forms.

    Returns
    -------
    ImageSequence

    Raises
    ------
    ValueError, TypeError
        If ``X`` is none of these forms, is empty, or has the wrong number of channels or columns.
    FileNotFoundError, IsADirectoryError
        If a path does not exist, or is a folder.
    """
    if isinstance(X, ImageSequence):
        return X
    items = items_of(X, image_shape)
    images, masks = ImageSequence(items, np.arange(len(items))), getattr(X, "ignore_paths", None)
    return images if masks is None or all(mask is None for mask in masks) else images.ignoring(masks)


class ImageSequence:
    """Checked images, read when they are needed; created by `check_images`.

    Decoded pixels are never kept. A pickle holds the arrays or paths of the images.

    Parameters
    ----------
    items : indexable
        ``items[i]`` is a single image: an array or tensor (H, W) or (H, W, C), a PIL image, a path (str), or the bytes
        of a file.
    indices : ndarray of int
        Items in this sequence, in order.
    ignored : Ignored, optional
        Masks of what to ignore, by the numbers of the items.
    """

    def __init__(
        self,
        items: Any,
        indices: np.ndarray,
        _said: set[str] | None = None,
        ignored: Ignored | None = None,
        _numbers: np.ndarray | None = None,
    ) -> None:
        self._items = items
        self._indices = indices
        self._numbers = indices if _numbers is None else _numbers
        self.ignored = ignored
        # Shared with every subset, so that one X warns once.
        self._said = set() if _said is None else _said

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def reads_in_threads(self) -> bool:
        """Whether several threads may read at the same time; False for a caller's own collection."""
        return isinstance(self._items, list) or is_array(self._items)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)} images>"

    def name(self, i: int) -> str:
        """Name of image `i` for messages, such as ``image 17 of X, path 'a.png'``."""
        path = self.path(i)
        return f"image {int(self._numbers[i])} of X" + ("" if path is None else f", path {path!r}")

    def path(self, i: int) -> str | None:
        """Path of image `i`, or None if it is not a file."""
        item = self._items[int(self._indices[i])] if isinstance(self._items, list) else None
        return item if isinstance(item, str) else None

    def subset(self, indices: Any) -> ImageSequence:
        """A view of some images (int array, boolean mask or slice), whose names keep their number in X."""
        if not isinstance(indices, slice):
            indices = np.asarray(indices)
            indices = indices.astype(np.intp) if indices.size == 0 else indices
        return ImageSequence(self._items, self._indices[indices], self._said, self.ignored, self._numbers[indices])

    def part(self, indices: Any, ignored: bool = True) -> ImageSequence:
        """Like `subset`, but holding only these images and absolute paths, to be sent to another process.

        Unless ``ignored``, the mask for all images is left out.
        """
        places, masks = self._indices[indices].tolist(), None
        items = [self._items[place] for place in places]
        items = [os.path.abspath(item) if isinstance(item, str) else item for item in items]
        if self.ignored is not None and (ignored or self.ignored.each is not None):
            masks = self.ignored.part(places, ignored)
        return ImageSequence(items, np.arange(len(items)), set(self._said), masks, self._numbers[indices])

    def ignoring(self, masks: Any) -> ImageSequence:
        """The same images with masks of what to ignore: those parts are neither learned nor judged.

        The backbone sees grey there, and map cells inside a mask have no effect.

        Parameters
        ----------
        masks : array of shape (H, W), path, or sequence of these and None
            True, or not black, where to ignore the image: one mask for all images, stretched to the size of each, or
            one for each image, of its size.

        Returns
        -------
        ImageSequence

        Raises
        ------
        ValueError
            When a mask is invalid or covers everything, or the number of masks and images differ.

        Examples
        --------
        >>> import numpy as np
        >>> from vqad.images import check_images
        >>> label = np.zeros((2, 32, 32), bool)
        >>> label[:, 4:9, 3:20] = True
        >>> images = check_images(np.full((2, 32, 32), 0.3)).ignoring([*label])
        >>> images.pixels(0)[5, 5].tolist()
        [0.5, 0.5, 0.5]
        """
        one, each = (None, None) if self.ignored is None else (self.ignored.one, self.ignored.each)
        if isinstance(masks, (str, os.PathLike)) or getattr(masks, "ndim", None) == 2:
            new = as_mask(masks, "the mask to ignore")
            if one is not None and one.shape != new.shape:
                raise ValueError(f"two masks for all images have shapes {one.shape} and {new.shape}: combine them.")
            one = new if one is None else one | new
        else:
            if each is not None:
                raise ValueError("these images already have a mask each of what to ignore: combine the masks.")
            own = check_each(masks, len(self))
            each = [None] * (int(self._indices.max(initial=-1)) + 1)
            for origin, mask in zip(self._indices.tolist(), own):
                each[origin] = mask
        return ImageSequence(self._items, self._indices, self._said, Ignored(one, each), self._numbers)

    def mask(self, i: int, size: tuple[int, int] | None = None) -> np.ndarray | None:
        """Mask of what to ignore in image `i`, bool, at its own size or stretched to `size`; None for nothing."""
        if self.ignored is None:
            return None
        own = self.ignored.at(int(self._indices[i]), self.size(i), self.name(i))
        return own if own is None or size is None else stretched(own, size)

    def seen(self, i: int, grid: tuple[int, int]) -> torch.Tensor:
        """Share of each cell of a grid that is not ignored in image `i`, (1, rows, columns)."""
        ignored = Ignored() if self.ignored is None else self.ignored
        return ignored.seen(int(self._indices[i]), grid, self.name(i))

    def size(self, i: int) -> tuple[int, int]:
        """Height and width of image `i` in pixels, upright. Of a file only the header is read."""
        item, name = self._item(i), self.name(i)
        if isinstance(item, (str, bytes)):
            with opened(item, name, of_any_size=True) as image:
                return upright_size(image)
        if isinstance(item, Image.Image):
            with loaded(item, name) as image:
                return upright_size(image)
        return int(item.shape[0]), int(item.shape[1])

    def pixels(self, i: int) -> np.ndarray:
        """Pixels of image `i` at its own size.

        Returns
        -------
        ndarray of shape (H, W, 3), float32, in 0..1
            A new array; grey is repeated to three channels.

        Raises
        ------
        ValueError
            If the file is truncated or not an image, or if values are not finite or not in 0..1.
        """
        raw = self.stored(i)
        pixels = _scaled(raw, self._mask_of(i, raw), self.name(i))
        return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels

    def digest(self, i: int) -> str:
        """SHA-256 of the file or array of image `i` and of its mask. Files are not decoded."""
        ignored = "" if self.ignored is None else self.ignored.digest(int(self._indices[i]))
        return self._own_digest(i) if not ignored else f"{self._own_digest(i)}-{ignored}"

    def _own_digest(self, i: int) -> str:
        item, name = self._item(i), self.name(i)
        if isinstance(item, (str, bytes)):
            with readable(item, name) as file:
                return hashlib.sha256(file.read()).hexdigest()
        if isinstance(item, Image.Image):
            with loaded(item, name) as image:
                item, _ = pil_to_array(image)
        values = np.ascontiguousarray(tensor_to_array(item))
        digest = hashlib.sha256(f"{values.shape}{values.dtype.str}".encode())
        digest.update(values.data)
        return digest.hexdigest()

    def load(self, indices: Any, size: tuple[int, int]) -> torch.Tensor:
        """Read images and resize each to `size`, bilinear with antialiasing.

        Parameters
        ----------
        indices : sequence of int
            Positions of the images in this sequence.
        size : (h, w)
            Height and width in pixels.

        Returns
        -------
        Tensor of shape (len(indices), 3, h, w), float32, in 0..1
        """
        indices = np.asarray(indices, dtype=np.intp)
        batch = torch.empty((len(indices), 3, *size), dtype=torch.float32)
        for slot, i in zip(batch, indices):
            slot.copy_(self._resized(int(i), [size])[0])
        return batch

    def views(self, i: int, sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """Result of `load` for one image at several sizes, (1, 3, h, w) each, decoding it once."""
        return [view.expand(1, 3, *size).contiguous() for view, size in zip(self._resized(int(i), sizes), sizes)]

    def stored(self, i: int) -> np.ndarray:
        """Pixels of image `i` as stored, (H, W, 1) or (H, W, 3) of any type, without alpha."""
        item, name = self._item(i), self.name(i)
        if isinstance(item, (str, bytes)):
            with opened(item, name) as image:
                if is_narrowed(image):
                    self._warn_once(name, "16 bits per channel, of which 8 are read: pass arrays of uint16 for all 16.")
                raw, has_alpha = pil_to_array(image)
                has_pages = has_more_pages(image)
            if has_pages:
                self._warn_once(name, "several pages or frames: only the first is used.")
        elif isinstance(item, Image.Image):
            with loaded(item, name) as image:
                raw, has_alpha = pil_to_array(image)
        else:
            raw = tensor_to_array(item)
            has_alpha = raw.ndim == 3 and raw.shape[2] == 4
        if has_alpha:
            self._warn_once(name, "an alpha channel: it is dropped, and the colours are used as stored.")
        return raw[:, :, None] if raw.ndim == 2 else raw[:, :, :3]

    def _mask_of(self, i: int, raw: np.ndarray) -> np.ndarray | None:
        if self.ignored is None:
            return None
        return self.ignored.at(int(self._indices[i]), (raw.shape[0], raw.shape[1]), self.name(i))

    def _resized(self, i: int, sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """Image `i` at each of several sizes: (3, h, w), or (1, h, w) if it is grey.

        A large image of integers is converted to float and made narrower some rows at a time. The result is the same
        to the last bit, without floats of the whole image in memory.
        """
        raw, name = self.stored(i), self.name(i)
        mask = self._mask_of(i, raw)
        height, width = raw.shape[:2]
        in_bands = raw.dtype.kind in "bu" and any((height, width) != tuple(size) for size in sizes)
        n_rows = max(1, BAND_PIXELS // width) if in_bands else height
        bands = []
        for y in range(0, height, n_rows):
            hidden = None if mask is None else mask[y : y + n_rows]
            band = torch.from_numpy(_scaled(raw[y : y + n_rows], hidden, name)).permute(2, 0, 1)
            whole = n_rows >= height
            bands.append([band if whole else _interpolated(band, (band.shape[1], size[1])) for size in sizes])
        joined = [parts[0] if len(parts) == 1 else torch.cat(parts, 1) for parts in zip(*bands)]
        return [_interpolated(image, size).clamp(0.0, 1.0) for image, size in zip(joined, sizes)]

    def _item(self, i: int) -> Any:
        origin = int(self._indices[i])
        item = self._items[origin]
        # Lists and arrays were checked by check_images; items of a lazy object can only be checked here.
        return item if isinstance(self._items, list) or is_array(self._items) else check_item(item, origin)

    def warn_once(self, i: int, what: str) -> None:
        """Warn about image `i`, unless another image of this X raised the same warning."""
        self._warn_once(self.name(i), what)

    def is_news(self, message: str) -> bool:
        """Whether a warning from another process about some of these images was not issued before."""
        what = message.rpartition(" has ")[2]
        if what in self._said:
            return False
        self._said.add(what)
        return True

    def _warn_once(self, name: str, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warn(f"{said_of(name, 'has')} {what}")


def _scaled(raw: np.ndarray, hidden: np.ndarray | None, name: str) -> np.ndarray:
    """Pixels as floats in 0..1, grey where they are ignored; ignored values are not checked."""
    if hidden is None:
        return to_unit_range(raw, name)
    if raw.dtype.kind == "f":
        raw = np.where(hidden[:, :, None], raw.dtype.type(0), raw)
    pixels = to_unit_range(raw, name)
    pixels[hidden] = GREY
    return pixels


def _interpolated(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if tuple(image.shape[1:]) == tuple(size):
        return image
    return F.interpolate(image[None], tuple(size), mode="bilinear", align_corners=False, antialias=True)[0]
