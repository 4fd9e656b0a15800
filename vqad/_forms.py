"""Accepted forms of X and of a single image, with errors that say what was passed instead."""

from __future__ import annotations

import numbers
import os
from typing import Any

import numpy as np
import torch
from PIL import Image

from vqad._checks import is_missing
from vqad._decode import check_dtype, not_there, said_of

CHANNELS = (1, 3, 4)
_BYTES = (bytes, bytearray, memoryview)
_LONGEST_PATH = 4096
_FORMS = (
    "an array (n, H, W) or (n, H, W, C), a list of images of any sizes (arrays, PIL images, file paths, or the bytes "
    "of image files), an array or Series of file paths, or a vqad.datasets collection"
)
_ONE_FORM = "an image is an array, a PIL image, a file path, or the bytes of an image file"


def items_of(X: Any, image_shape: tuple[int, ...] | None) -> Any:
    """Check X as far as possible without reading pixels, and return an indexable of its images.

    That is a list of checked items, an array with images along its first axis, or the caller's own collection.
    """
    _reject_single_image(X)
    _reject_pairs(X)
    if hasattr(X, "paths") and not hasattr(X, "iloc"):
        X = list(X.paths)
    if isinstance(X, torch.Tensor):
        X = X.detach()
    elif not isinstance(X, (list, tuple)) and not is_array(X):
        X = _as_known_form(X)
    if isinstance(X, (list, tuple)):
        X = _stack_if_rows(list(X))
    if not is_array(X):
        items = X
    elif X.ndim == 1:
        items = _items_of_1d(X)
    else:
        items = _check_stack(X, image_shape)
    if len(items) == 0:
        raise ValueError("X is empty: at least one image is needed.")
    return [check_item(item, i) for i, item in enumerate(items)] if isinstance(items, list) else items


def is_array(X: Any) -> bool:
    """Whether X is an array from which single images can be read: numpy, torch, memmap, HDF5, zarr."""
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
    """Raise for a list of (image, label), which would otherwise be taken for rows of numbers."""
    first = X[0] if isinstance(X, (list, tuple)) and X else None
    if not isinstance(first, (list, tuple)) or not first or not _looks_like_an_image(first[0]):
        return
    shapes = {getattr(value, "shape", None) for value in first}
    if len(shapes) > 1 or None in shapes:  # otherwise these may be rows of pixels
        raise ValueError(f"X is a list of {_kind(first)}s {_of_several(first)}")


def _looks_like_an_image(value: Any) -> bool:
    is_one = isinstance(value, (str, os.PathLike, Image.Image, *_BYTES)) or _is_file(value)
    return is_one or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim >= 2)


def _of_several(item: Any) -> str:
    """The end of an error message: what a composite item holds, and how to pass the image in it."""
    held = ", ".join(map(repr, item) if isinstance(item, dict) else map(_kind, item))
    first = "0"
    if isinstance(item, dict):
        first = next((repr(key) for key, value in item.items() if _looks_like_an_image(value)), "'image'")
    return (
        f"of {held}, as from a data set of (image, label), but {_ONE_FORM}: pass [item[{first}] for item in X], or an "
        "object whose X[i] is only the image, and labels as y."
    )


def _as_known_form(X: Any) -> Any:
    """Make an array of an unknown container, or leave it as a lazy object with len(X) and X[i]."""
    if hasattr(X, "toarray"):
        raise TypeError("X is a sparse matrix, but dense images are needed: use X.toarray() and image_shape=(H, W).")
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
        return " Pass its images: a list of them, or X.dataset if its items are images without labels."
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
        # A path has no zero byte and a limited length. Numpy drops trailing zeros, which some files have.
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
    """Check an array of two or more axes; return it as (n, H, W) or (n, H, W, C)."""
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
            f"{_FORMS}. From a table pass the column of paths."
        )
    return made


def _rows_to_stack(X: Any, image_shape: tuple[int, ...] | None) -> Any:
    n, n_columns = (int(length) for length in X.shape)
    if image_shape is None:
        raise ValueError(
            f"X is a 2-D array of shape {(n, n_columns)}: set image_shape=(H, W) or (H, W, C) if its rows are "
            "flattened images, or backbone=None if they are feature vectors; pass X[None] if X is one image."
        )
    shape = tuple(image_shape)
    is_positive = all(isinstance(length, numbers.Integral) and length > 0 for length in shape)
    if len(shape) not in (2, 3) or not is_positive or (len(shape) == 3 and shape[2] not in CHANNELS):
        raise ValueError(f"image_shape must be (H, W) or (H, W, C) with C = 1, 3 or 4; got {image_shape!r}.")
    if n_columns != np.prod(shape):
        raise ValueError(
            f"X has {n_columns} columns, but image_shape={shape} means {' x '.join(map(str, shape))} = "
            f"{np.prod(shape)} columns, one image per row."
        )
    return X.reshape(n, *shape, *(() if len(shape) == 3 else (1,)))


# ---- the form of one image -----------------------------------------------------------------------


def check_item(item: Any, i: int) -> Any:
    """Check one image as far as possible without reading its pixels; paths become str, open files their bytes."""
    if isinstance(item, (str, os.PathLike)):
        path = os.fspath(item)
        name = f"image {i} of X, path {path!r}"
        if not os.path.isfile(path):
            if os.path.isdir(path):
                raise _folder_error(name, path)
            if len(path) > _LONGEST_PATH or str(path).startswith("data:"):
                raise ValueError(
                    f"image {i} of X is a str of {len(path)} characters, {path[:40]!r}..., which is not a path. If it "
                    "is an image in base64, pass base64.b64decode(text) of what follows the comma."
                )
            raise not_there(path, name)
        return str(path)
    name = f"image {i} of X"
    if isinstance(item, _BYTES) or _is_file(item):
        return _bytes_of(item, name)
    if is_missing(item):
        raise ValueError(f"{name} is missing ({item}): give its path, or leave it out.")
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
    """The bytes of an image file, which came as such or as an open file; that is read from its beginning."""
    if not isinstance(item, _BYTES):
        try:
            if callable(getattr(item, "seek", None)) and getattr(item, "seekable", lambda: True)():
                item.seek(0)
            read = item.read()
        except (OSError, ValueError) as error:  # closed, or opened only for writing
            raise ValueError(f"{name} is a file that cannot be read: {error}.") from error
        if not isinstance(read, _BYTES):
            if hasattr(read, "close"):  # a coroutine, which would warn that it was never awaited
                read.close()
            raise TypeError(
                f"{name} is a file, {_kind(item)}, that returns {_kind(read)} instead of bytes: open it with mode "
                "'rb', or pass the bytes themselves."
            )
        item = read
    if len(item) == 0:
        raise ValueError(f"{name} is empty (0 bytes): an image file is expected.")
    return bytes(item)


def _check_shape(shape: tuple[int, ...], name: str, expected: str, channels_last: str) -> None:
    """Check the shape (H, W) or (H, W, C) of one image, or of every image of a stack."""
    if len(shape) not in (2, 3):
        raise ValueError(f"{name} must have shape {expected}.")
    if len(shape) == 3 and shape[2] not in CHANNELS:
        advice = f" The channels seem to come first: pass {channels_last}." if shape[0] in CHANNELS else ""
        raise ValueError(
            f"{name} must have shape {expected}, that is C = {shape[2]} channels, but 1 (grey), 3 (RGB) or 4 (RGBA) "
            f"are expected.{advice}"
        )
    if 0 in shape:
        raise ValueError(f"{name} must have shape {expected}, which has no pixels.")


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")


def _folder_error(name: str, path: str) -> IsADirectoryError:
    return IsADirectoryError(
        f"{said_of(name, 'is')} a folder, not an image file: to use the images in it pass "
        f"vqad.datasets.load_folder({path!r})."
    )
