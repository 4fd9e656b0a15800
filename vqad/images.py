"""From what a caller passes as ``X`` to batches of pixels.

Every accepted form ends as something indexable whose items are single images (an array, a tensor, a PIL
image or a path), and every item takes the same way from there: decoded, scaled to 0..1, given three channels,
resized. So two forms of one picture cannot differ in their pixels, nor can one picture in other company.
"""

from __future__ import annotations

import hashlib
import numbers
import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from vqad._checks import is_missing
from vqad._decode import (
    check_dtype,
    has_more_pages,
    is_narrowed,
    loaded,
    not_there,
    opened,
    pil_to_array,
    readable,
    said_of,
    tensor_to_array,
    to_unit_range,
    upright_size,
)
from vqad._warn import warn

__all__ = ["ImageSequence", "check_images"]

CHANNELS = (1, 3, 4)
_BYTES = (bytes, bytearray, memoryview)
_LONGEST_PATH = 4096
# Pixels that are floats at a time while a large image is made smaller.
BAND_PIXELS = 2**20
_FORMS = (
    "an array (n, H, W) or (n, H, W, C), a list of images of any sizes (arrays, PIL images, file paths, or the bytes "
    "of image files), an array or Series of file paths, or a vqad.datasets collection"
)
_ONE_FORM = "an image is an array, a PIL image, a file path, or the bytes of an image file"


def check_images(X: Any, *, image_shape: tuple[int, ...] | None = None) -> ImageSequence:
    """Check the form of ``X`` and wrap it; pixels are read, and checked, only when they are loaded.

    Parameters
    ----------
    X : array, tensor, list, tuple, Series or lazy collection
        One of

        - array or torch tensor of shape (n, H, W) or (n, H, W, C), with C = 1 (grey), 3 (RGB) or 4 (RGBA,
          alpha is dropped with a warning). Any object with numpy's ``shape``, ``dtype`` and indexing, such as
          a memmap or an HDF5 data set, is read image by image;
        - list, tuple or object array of single images of any sizes: arrays or tensors of shape (H, W) or
          (H, W, C), PIL images, file paths, and the bytes of image files, or files opened for reading them;
        - array or pandas Series of file paths, or of bytes;
        - an object with a sequence of file paths as attribute ``paths``, as `vqad.datasets.ImageDataset` has;
        - any other object with ``len(X)`` and ``X[i]``, where ``X[i]`` is a single image in one of these
          forms and is asked for whenever it is needed;
        - rows (n, n_features) when `image_shape` is given.

        Unsigned integers are divided by their type's maximum, booleans are 0 and 1, floats are taken as 0..1.
    image_shape : (H, W) or (H, W, C), default=None
        Shape of the images that the rows of a 2-D ``X`` were flattened from; unused for any other form.

    Returns
    -------
    ImageSequence

    Raises
    ------
    ValueError, TypeError
        If ``X`` is none of these forms, is empty, or has the wrong number of channels or columns.
    FileNotFoundError, IsADirectoryError
        If a path leads to nothing, or to a folder.
    """
    if isinstance(X, ImageSequence):
        return X
    _reject_single_image(X)
    _reject_pairs(X)
    if hasattr(X, "paths") and not hasattr(X, "iloc"):
        X = list(X.paths)
    if isinstance(X, torch.Tensor):
        X = X.detach()
    elif not isinstance(X, (list, tuple)) and not _is_array(X):
        X = _as_known_form(X)
    if isinstance(X, (list, tuple)):
        X = _stack_if_rows(list(X))
    if not _is_array(X):
        items = X
    elif X.ndim == 1:
        items = _items_of_1d(X)
    else:
        items = _check_stack(X, image_shape)
    if len(items) == 0:
        raise ValueError("X is empty: at least one image is needed.")
    if isinstance(items, list):
        items = [_check_item(item, i) for i, item in enumerate(items)]
    return ImageSequence(items, np.arange(len(items)))


class ImageSequence:
    """Checked images, read when they are asked for; made by `check_images`.

    Decoded pixels are never kept. The sequence pickles, with the arrays or the paths that it was made from.

    Parameters
    ----------
    items : indexable
        ``items[i]`` is a single image: an array or tensor (H, W) or (H, W, C), a PIL image, a path (str), or the bytes
        of a file.
    indices : ndarray of int
        Which items, in which order.
    """

    def __init__(
        self, items: Any, indices: np.ndarray, _said: set[str] | None = None, _numbers: np.ndarray | None = None
    ) -> None:
        self._items = items
        self._indices = indices
        self._numbers = indices if _numbers is None else _numbers
        # Shared with every subset, so that one X warns once.
        self._said = set() if _said is None else _said

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def reads_in_threads(self) -> bool:
        """Whether several threads may read at a time: not from a caller's own collection."""
        return isinstance(self._items, list) or _is_array(self._items)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)} images>"

    def name(self, i: int) -> str:
        """Name of image `i` in the caller's terms, such as ``image 17 of X, path 'a.png'``."""
        path = self.path(i)
        return f"image {int(self._numbers[i])} of X" + ("" if path is None else f", path {path!r}")

    def path(self, i: int) -> str | None:
        """The file of image `i`, if it came as one."""
        item = self._items[int(self._indices[i])] if isinstance(self._items, list) else None
        return item if isinstance(item, str) else None

    def subset(self, indices: Any) -> ImageSequence:
        """Return a view of some images (int array, boolean mask or slice); names keep their number in X."""
        if not isinstance(indices, slice):
            indices = np.asarray(indices)
            indices = indices.astype(np.intp) if indices.size == 0 else indices
        return ImageSequence(self._items, self._indices[indices], self._said, self._numbers[indices])

    def part(self, indices: Any) -> ImageSequence:
        """As `subset`, with nothing in it but these images, to be sent to a process that may be in another folder."""
        items = [self._items[int(place)] for place in self._indices[indices]]
        items = [os.path.abspath(item) if isinstance(item, str) else item for item in items]
        return ImageSequence(items, np.arange(len(items)), set(self._said), self._numbers[indices])

    def size(self, i: int) -> tuple[int, int]:
        """Height and width of image `i` in pixels, upright; of a file only the header is read, however large it is."""
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
            If the file is truncated or no image, or if the values are not finite or not in 0..1.
        """
        pixels = to_unit_range(self._raw(i), self.name(i))
        return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels

    def digest(self, i: int) -> str:
        """SHA-256 of what image `i` is made from: the bytes of its file, or its array. Nothing is decoded."""
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
            Which images of this sequence.
        size : (h, w)
            Height and width in pixels.

        Returns
        -------
        Tensor of shape (len(indices), 3, h, w), float32, in 0..1
        """
        indices = np.asarray(indices, dtype=np.intp)
        batch = torch.empty((len(indices), 3, *size), dtype=torch.float32)
        for slot, i in zip(batch, indices):
            slot.copy_(self._resized(int(i), size))
        return batch

    def _raw(self, i: int) -> np.ndarray:
        """Image `i` as it is stored, (H, W, 1) or (H, W, 3) of any type; alpha is dropped."""
        item, name = self._item(i), self.name(i)
        if isinstance(item, (str, bytes)):
            with opened(item, name) as image:
                if is_narrowed(image):
                    self._warn_once(name, "16 bits a channel, of which 8 are read: pass arrays of uint16 for all 16.")
                raw, has_alpha = pil_to_array(image)
                has_pages = has_more_pages(image)
            if has_pages:
                self._warn_once(name, "several pages or frames: the first is taken, the others are not looked at.")
        elif isinstance(item, Image.Image):
            with loaded(item, name) as image:
                raw, has_alpha = pil_to_array(image)
        else:
            raw = tensor_to_array(item)
            has_alpha = raw.ndim == 3 and raw.shape[2] == 4
        if has_alpha:
            self._warn_once(name, "an alpha channel: it is dropped, the colours are kept as stored.")
        return raw[:, :, None] if raw.ndim == 2 else raw[:, :, :3]

    def _resized(self, i: int, size: tuple[int, int]) -> torch.Tensor:
        """Image `i` at `size`: (3, h, w), or (1, h, w) of a grey one.

        A large image of whole numbers becomes floats, and narrower, some rows at a time: that gives the same to the
        last bit, and never are there floats of all of it.
        """
        raw, name = self._raw(i), self.name(i)
        height, width = raw.shape[:2]
        in_bands = raw.dtype.kind in "bu" and (height, width) != tuple(size)
        n_rows = max(1, BAND_PIXELS // width) if in_bands else height
        bands = []
        for y in range(0, height, n_rows):
            band = torch.from_numpy(to_unit_range(raw[y : y + n_rows], name)).permute(2, 0, 1)
            bands.append(band if n_rows >= height else _interpolated(band, (band.shape[1], size[1])))
        return _interpolated(bands[0] if len(bands) == 1 else torch.cat(bands, 1), size).clamp_(0.0, 1.0)

    def _item(self, i: int) -> Any:
        origin = int(self._indices[i])
        item = self._items[origin]
        # Lists and arrays were checked by check_images; what a lazy object gives is seen only here.
        return item if isinstance(self._items, list) or _is_array(self._items) else _check_item(item, origin)

    def warn_once(self, i: int, what: str) -> None:
        """Warn of what image `i` has, unless another of this X had the same."""
        self._warn_once(self.name(i), what)

    def is_news(self, message: str) -> bool:
        """Whether a warning that another process had of some of these images was not said of others before."""
        what = message.rpartition(" has ")[2]
        if what in self._said:
            return False
        self._said.add(what)
        return True

    def _warn_once(self, name: str, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warn(f"{said_of(name, 'has')} {what}")


def _interpolated(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if tuple(image.shape[1:]) == tuple(size):
        return image
    return F.interpolate(image[None], tuple(size), mode="bilinear", align_corners=False, antialias=True)[0]


# ---- the form of X -------------------------------------------------------------------------------


def _is_array(X: Any) -> bool:
    """Whether X is an array that can be read image by image: numpy, torch, memmap, HDF5, zarr."""
    if isinstance(X, (np.ndarray, torch.Tensor)):
        return True
    is_lazy_array = hasattr(X, "shape") and isinstance(getattr(X, "dtype", None), np.dtype)
    return is_lazy_array and hasattr(X, "__getitem__") and len(X.shape) >= 3


def _reject_single_image(X: Any) -> None:
    if isinstance(X, (str, os.PathLike)):
        if os.path.isdir(X):
            raise _folder_error("X", os.fspath(X))
        raise ValueError(f"X is a single path, {os.fspath(X)!r}: pass a list of paths, [path].")
    if isinstance(X, Image.Image):
        raise ValueError("X is a single PIL image: pass a list of images, [image].")
    if isinstance(X, _BYTES):
        raise ValueError("X is the bytes of a single image: pass a list of them, [X].")
    if _is_file(X) and not hasattr(X, "__getitem__"):
        raise ValueError(f"X is a single file, {_kind(X)}: pass a list of files, [X].")


def _reject_pairs(X: Any) -> None:
    """Raise for a list of (image, label): a list of tuples would be taken for rows of numbers."""
    first = X[0] if isinstance(X, (list, tuple)) and X else None
    if not isinstance(first, (list, tuple)) or not first or not _looks_like_an_image(first[0]):
        return
    shapes = {getattr(value, "shape", None) for value in first}
    if len(shapes) > 1 or None in shapes:  # else these may be rows of pixels
        raise ValueError(f"X is a list of {_kind(first)}s {_of_several(first)}")


def _looks_like_an_image(value: Any) -> bool:
    is_one = isinstance(value, (str, os.PathLike, Image.Image, *_BYTES)) or _is_file(value)
    return is_one or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim >= 2)


def _of_several(item: Any) -> str:
    """Of what an item of several values is, and how to give the image in it alone."""
    held = ", ".join(map(repr, item) if isinstance(item, dict) else map(_kind, item))
    first = "0"
    if isinstance(item, dict):
        first = next((repr(key) for key, value in item.items() if _looks_like_an_image(value)), "'image'")
    return (
        f"of {held}, as data sets of (image, label) give; {_ONE_FORM}: pass [item[{first}] for item in X], or an "
        "object whose X[i] is the image alone, and labels as y."
    )


def _as_known_form(X: Any) -> Any:
    """Make an array of an unknown container, or leave it as a lazy object with len(X) and X[i]."""
    if hasattr(X, "toarray"):
        raise TypeError("X is a sparse matrix: dense images are needed; use X.toarray() and image_shape=(H, W).")
    if hasattr(X, "__array__"):
        return np.asarray(X)
    is_sized = hasattr(X, "__len__") and hasattr(X, "__getitem__")
    if not is_sized or hasattr(X, "keys"):
        raise TypeError(f"X must be {_FORMS}; got {_kind(X)}.{_way_to_a_list(X)}")
    return X


def _way_to_a_list(X: Any) -> str:
    if hasattr(X, "keys"):
        names = ", ".join(map(repr, list(X.keys())[:5]))
        return f" It has {names}: pass one of its values, or list(X.values())." if hasattr(X, "values") else ""
    if hasattr(X, "dataset"):  # torch's DataLoader, whose items are batches
        return " Pass its images: a list of them, or X.dataset if that gives images without labels."
    return " Use list(X)." if hasattr(X, "__iter__") else ""


def _stack_if_rows(X: list[Any]) -> Any:
    """Make an array of a list of numbers or rows (nested lists, 1-D arrays); leave a list of images alone."""

    def is_row(item: Any) -> bool:
        return isinstance(item, (list, tuple, numbers.Number)) or getattr(item, "ndim", None) in (0, 1)

    if not X or isinstance(X[0], (str, os.PathLike, *_BYTES)) or not is_row(X[0]):
        return X
    try:
        return np.asarray(X)
    except ValueError as error:
        raise ValueError(
            f"X is a list of {_kind(X[0])} that does not make one array ({error}). X must be {_FORMS}."
        ) from error


def _items_of_1d(X: Any) -> list[Any]:
    """List the items of a 1-D array of paths or images."""
    if isinstance(X, np.ndarray) and X.dtype.kind == "S":
        # A path has no zero byte, nor is any so long. Numpy drops the zeros at the end, which some files have.
        is_file = [b"\0" in item or len(item) > _LONGEST_PATH for item in X.tolist()]
        return [
            item.ljust(X.dtype.itemsize, b"\0") if whole else os.fsdecode(item)
            for item, whole in zip(X.tolist(), is_file)
        ]
    if isinstance(X, np.ndarray) and X.dtype.kind in "OUT":
        return X.tolist()
    raise ValueError(
        f"X has one dimension, shape {tuple(X.shape)} and dtype {X.dtype}; X must be {_FORMS}. "
        "For one flattened image pass X[None] and image_shape=(H, W)."
    )


def _check_stack(X: Any, image_shape: tuple[int, ...] | None) -> Any:
    """Check an array of images with two axes or more; give it as (n, H, W) or (n, H, W, C)."""
    if isinstance(X, np.ndarray) and X.dtype.kind in "OUST":
        X = _numbers_of_objects(X)
    if X.ndim == 2:
        X = _rows_to_stack(X, image_shape)
    shape = tuple(X.shape)
    if X.ndim not in (3, 4):
        raise ValueError(f"X must be {_FORMS}; got an array of shape {shape}.")
    if X.ndim == 3 and shape[2] in CHANNELS:
        raise ValueError(
            f"X has shape {shape}, which looks like one image (H, W, C): pass X[None] for one image, "
            f"or X[..., None] if these are {shape[0]} grey images only {shape[2]} pixels wide."
        )
    if shape[0]:
        _check_shape(shape[1:], "X", f"(n, H, W, C); got shape {shape}", "np.moveaxis(X, 1, -1)")
    check_dtype(X.dtype, "X")
    return X


def _numbers_of_objects(X: np.ndarray) -> np.ndarray:
    try:
        made = np.array(X.tolist())
    except ValueError:
        made = X
    if made.dtype.kind not in "biuf":
        raise ValueError(
            f"X has shape {X.shape} and dtype {X.dtype}, and its entries are not numbers; X must be "
            f"{_FORMS}. Of a table pass the one column of paths."
        )
    return made


def _rows_to_stack(X: Any, image_shape: tuple[int, ...] | None) -> Any:
    n, n_columns = (int(length) for length in X.shape)
    if image_shape is None:
        raise ValueError(
            f"X is a 2-D array of shape {(n, n_columns)}: give image_shape=(H, W) or (H, W, C) if its rows "
            "are flattened images, backbone=None if they are feature vectors; pass X[None] if X is one image."
        )
    shape = tuple(image_shape)
    is_positive = all(isinstance(length, numbers.Integral) and length > 0 for length in shape)
    if len(shape) not in (2, 3) or not is_positive or (len(shape) == 3 and shape[2] not in CHANNELS):
        raise ValueError(f"image_shape must be (H, W) or (H, W, C) with C = 1, 3 or 4; got {image_shape!r}.")
    if n_columns != np.prod(shape):
        raise ValueError(
            f"X has {n_columns} columns, but image_shape={shape} means {' x '.join(map(str, shape))} = "
            f"{np.prod(shape)} columns, one image a row."
        )
    return X.reshape(n, *shape, *(() if len(shape) == 3 else (1,)))


# ---- the form of one image -----------------------------------------------------------------------


def _check_item(item: Any, i: int) -> Any:
    """Check what can be known of one image without reading its pixels; paths become str, open files their bytes."""
    if isinstance(item, (str, os.PathLike)):
        path = os.fspath(item)
        name = f"image {i} of X, path {path!r}"
        if not os.path.isfile(path):
            if os.path.isdir(path):
                raise _folder_error(name, path)
            if len(path) > _LONGEST_PATH or str(path).startswith("data:"):
                raise ValueError(
                    f"image {i} of X is a str of {len(path)} characters, {path[:40]!r}..., and no path: if it is an "
                    "image in base64 pass its bytes, base64.b64decode(text), without what precedes the comma."
                )
            raise not_there(path, name)
        return str(path)
    name = f"image {i} of X"
    if isinstance(item, _BYTES) or _is_file(item):
        return _bytes_of(item, name)
    if is_missing(item):
        raise ValueError(f"{name} is missing, {item}: give its path, or leave it out.")
    if isinstance(item, Image.Image):
        _check_shape((item.height, item.width), name, f"(H, W); got {item.height} x {item.width}", "")
        return item
    if isinstance(item, (list, tuple, dict)):
        raise TypeError(f"{name} is a {_kind(item)} " + (_of_several(item) if item else f"of nothing; {_ONE_FORM}."))
    if not isinstance(item, (np.ndarray, torch.Tensor)):
        if not hasattr(item, "__array__") or isinstance(item, np.generic):
            raise TypeError(f"{name} is {_kind(item)}; {_ONE_FORM}.")
        item = np.asarray(item)
    _check_shape(
        tuple(item.shape),
        name,
        f"(H, W) or (H, W, C); got shape {tuple(item.shape)}",
        "np.moveaxis(image, 0, -1)",
    )
    check_dtype(item.dtype, name)
    return item.detach() if isinstance(item, torch.Tensor) else item


def _is_file(item: Any) -> bool:
    return callable(getattr(item, "read", None)) and not hasattr(item, "__array__")


def _bytes_of(item: Any, name: str) -> bytes:
    """The bytes of an image file, given so or as a file that is open: all of that, from its beginning."""
    if not isinstance(item, _BYTES):
        try:
            if callable(getattr(item, "seek", None)) and getattr(item, "seekable", lambda: True)():
                item.seek(0)
            read = item.read()
        except (OSError, ValueError) as error:  # closed, or opened for writing alone
            raise ValueError(f"{name} is a file that cannot be read: {error}.") from error
        if not isinstance(read, _BYTES):
            if hasattr(read, "close"):  # a coroutine: it would complain that nobody waits for it
                read.close()
            raise TypeError(
                f"{name} is a file, {_kind(item)}, that gives {_kind(read)} in place of bytes: open it with mode 'rb', "
                "or pass the bytes themselves."
            )
        item = read
    if len(item) == 0:
        raise ValueError(f"{name} has no bytes: an image file is expected.")
    return bytes(item)


def _check_shape(shape: tuple[int, ...], name: str, expected: str, channels_last: str) -> None:
    """Check the shape (H, W) or (H, W, C) of one image, or of every image of a stack."""
    if len(shape) not in (2, 3):
        raise ValueError(f"{name} must have shape {expected}.")
    if len(shape) == 3 and shape[2] not in CHANNELS:
        advice = f" The channels seem to come first: pass {channels_last}." if shape[0] in CHANNELS else ""
        raise ValueError(
            f"{name} must have shape {expected}, that is C = {shape[2]} channels, where 1 (grey), 3 (RGB) or "
            f"4 (RGBA) are expected.{advice}"
        )
    if 0 in shape:
        raise ValueError(f"{name} must have shape {expected}, which has no pixels.")


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")


def _folder_error(name: str, path: str) -> IsADirectoryError:
    return IsADirectoryError(
        f"{said_of(name, 'is')} a folder, not an image file: for the images in it pass "
        f"vqad.datasets.load_folder({path!r})."
    )
