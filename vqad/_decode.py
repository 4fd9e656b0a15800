"""Decoding one image, from a file or whatever else holds its pixels, to an array in 0..1."""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

_LOADING = threading.Lock()
FLOAT_TOLERANCE = 1e-3
# Images of more than LARGE_PIXELS pixels whose files have more than LARGEST_RATIO pixels per byte are refused. No
# photograph compresses that well.
LARGE_PIXELS, LARGEST_RATIO = 50_000_000, 200
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,  # of the AVIF decoder
    struct.error,
    zlib.error,
)
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)  # the latter if warnings are errors
_REMEDY = (
    ", which is refused because a small malicious file could fill all memory. If you trust it, set "
    "PIL.Image.MAX_IMAGE_PIXELS = None before, or pass --any-size to the command, or pass its pixels as an array. "
    "Otherwise crop or shrink it."
)
_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_mask(path: str) -> np.ndarray:
    """Read a defect mask: True where any colour channel is not black.

    Parameters
    ----------
    path : str
        An image file of any mode. In JPEG files, whose compression changes black, the limit is half of white.

    Returns
    -------
    ndarray of shape (H, W), bool
    """
    name = f"mask {path!r}"
    with opened(path, name) as image:
        limit = 0.5 if image.format in ("JPEG", "MPO") else 0.0
        raw, _ = pil_to_array(image)
    marked = raw > limit * (np.iinfo(raw.dtype).max if raw.dtype.kind == "u" else 1)
    return np.any(np.atleast_3d(marked), axis=2)


def check_dtype(dtype: Any, name: str) -> None:
    kind = _dtype_kind(dtype)
    if kind in "buf":
        return
    if kind == "i":
        raise ValueError(
            f"{said_of(name, 'has')} dtype {dtype}, and the value range of signed integers is unknown. If the values "
            "are 0..255 cast them with .astype(np.uint8): unsigned integers are divided by their type's maximum."
        )
    raise ValueError(f"{said_of(name, 'has')} dtype {dtype}; pixels must be unsigned integers, booleans or floats.")


def _dtype_kind(dtype: Any) -> str:
    """Numpy's letter for the kind of a numpy or torch dtype."""
    if not isinstance(dtype, torch.dtype):
        return str(np.dtype(dtype).kind)
    if dtype.is_floating_point:
        return "f"
    if dtype.is_complex:
        return "c"
    name = str(dtype).removeprefix("torch.")
    return "b" if name == "bool" else "u" if name.startswith("uint") else "i"


def said_of(name: str, verb: str) -> str:
    """Append a verb to an image's name, with the comma that closes its path."""
    return f"{name}, {verb}" if ", path " in name else f"{name} {verb}"


def tensor_to_array(image: Any) -> np.ndarray:
    if isinstance(image, torch.Tensor):
        # numpy has no bfloat16
        image = image.float() if image.dtype == torch.bfloat16 else image
        return image.cpu().numpy()
    return np.asarray(image)


def to_unit_range(raw: np.ndarray, name: str) -> np.ndarray:
    """Check values and scale them to float32 in 0..1, in a new array.

    Values are divided by their type's maximum, not multiplied by its inverse: a correctly rounded quotient is the same
    float32 for 8 bits, 16 bits and floats of 32 or 64 bits.
    """
    if raw.dtype.kind == "b":
        return raw.astype(np.float32)
    if raw.dtype.kind == "u":
        wide = np.float32 if raw.dtype.itemsize <= 2 else np.float64
        pixels = raw.astype(wide)
        pixels /= wide(np.iinfo(raw.dtype).max)
        return pixels.astype(np.float32, copy=False)
    check_dtype(raw.dtype, name)
    low, high = float(raw.min()), float(raw.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"{said_of(name, 'contains')} NaN or infinite pixels.")
    if low < -FLOAT_TOLERANCE or high > 1 + FLOAT_TOLERANCE:
        negative = "Negative values in data: " if low < -FLOAT_TOLERANCE else ""  # scikit-learn's words
        raise ValueError(
            f"{negative}{said_of(name, 'has')} float pixels from {low:.4g} to {high:.4g}, but 0..1 is expected. If the "
            "values are 0..255 divide them by 255, or cast them with .astype(np.uint8)."
        )
    return np.clip(raw.astype(np.float32, copy=False), 0.0, 1.0)


def not_there(path: str | os.PathLike[str], name: str) -> FileNotFoundError:
    """The error for a path that leads to no file or folder; it names the working directory."""
    if os.path.lexists(path):
        return FileNotFoundError(f"{said_of(name, 'is')} not a file but a device, a pipe or a broken link.")
    try:
        here = f"the working directory is {os.getcwd()!r}"
    except OSError:  # it was deleted
        here = "nor does the working directory"
    return FileNotFoundError(f"{said_of(name, 'does')} not exist ({here}).")


def readable(path: str | bytes, name: str) -> BinaryIO:
    """Open a file, or the bytes of one, for reading."""
    if isinstance(path, bytes):
        return io.BytesIO(path)
    if not os.path.isfile(path) and os.path.exists(path) and not os.path.isdir(path):
        raise not_there(path, name)  # opening a pipe would wait for its other end
    try:
        return open(path, "rb")
    except OSError as error:
        raise type(error)(f"{said_of(name, 'cannot')} be opened: {error.strerror}.") from error


@contextmanager
def opened(path: str | bytes, name: str, *, of_any_size: bool = False) -> Iterator[Image.Image]:
    """Open an image file, or the bytes of one; errors carry the image's name.

    `of_any_size` also opens images over Pillow's limit, of which only the header may be read.
    """
    # The file is opened first because its errors differ, and passed as a file because Pillow 13 scrambles plain TIFF
    # files with an orientation tag when it opens them by name.
    with readable(path, name) as file, _decoding(name), _image_of(file, of_any_size) as image:
        yield image


def _image_of(file: BinaryIO, of_any_size: bool) -> Image.Image:
    try:
        image = Image.open(file)
    except _TOO_LARGE:
        image = _opened_unchecked(file)
        if of_any_size:
            return image
        raise _too_large(image) from None
    if not of_any_size and _is_bomb(image, file):
        raise _too_large(image)
    return image


def _is_bomb(image: Image.Image, file: BinaryIO) -> bool:
    """Whether a small file has very many pixels: even within Pillow's limit they could take over 1 GB."""
    pixels = image.size[0] * image.size[1]
    if Image.MAX_IMAGE_PIXELS is None or pixels <= LARGE_PIXELS:
        return False
    place = file.tell()
    n_bytes = file.seek(0, os.SEEK_END)
    file.seek(place)
    return n_bytes * LARGEST_RATIO < pixels


def _opened_unchecked(file: BinaryIO) -> Image.Image:
    """`Image.open` without its check of the size; lifting Pillow's limit would lift it in every thread."""
    file.seek(0)
    start = file.read(16)
    for kind in Image.ID:
        factory, accepts = Image.OPEN[kind]
        try:
            answer = accepts is None or accepts(start)
            if answer and not isinstance(answer, str):  # a str says why the format is not accepted
                file.seek(0)
                return factory(file, "")
        except (IndexError, TypeError, *_UNREADABLE):
            continue
    raise ValueError("it has more pixels than PIL.Image.MAX_IMAGE_PIXELS allows")


def _too_large(image: Image.Image) -> ValueError:
    width, height = image.size
    image.close()
    return _LargerThanAllowed(f"{height} x {width} pixels, {height * width:,}")


class _LargerThanAllowed(ValueError):
    """An image over Pillow's limit."""


@contextmanager
def loaded(image: Image.Image, name: str) -> Iterator[Image.Image]:
    """A caller's PIL image with its pixels loaded, by one thread at a time: X may hold the same image twice."""
    with _decoding(name):
        try:
            with _LOADING:
                image.load()
        except (AssertionError, AttributeError) as error:  # raised by Pillow if the image's file was closed
            raise ValueError("its file was closed before it was read") from error
        yield image


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    try:
        yield
    except _LargerThanAllowed as error:
        raise ValueError(f"{said_of(name, 'has')} {error}{_REMEDY}") from error
    except _TOO_LARGE as error:  # raised by a decoder
        raise ValueError(f"{said_of(name, 'has')} too many pixels ({error}){_REMEDY}") from error
    except _UNREADABLE as error:
        raise ValueError(f"{said_of(name, 'is')} truncated or not an image ({error}).") from error


def _orientation(image: Image.Image) -> int:
    # Pillow's getexif decodes a PNG file to the end in search of a late Exif chunk. Only chunks before the pixels count
    # here, so that `size` reads just the header and still agrees with `pixels`.
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return 1
    turn = image.getexif().get(_EXIF_ORIENTATION)
    return int(turn) if turn in range(1, 9) else 1  # real files also have text, bytes, NaN and infinity there


def _upright(image: Image.Image) -> Image.Image:
    if image.format == "TIFF":
        image.load()  # newer Pillow transposes TIFF files itself, and only then drops the tag
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def turned_by(path: str, name: str) -> tuple[int, tuple[int, int]]:
    """EXIF orientation of an image file, 1 for none, and its height and width as stored."""
    with opened(path, name, of_any_size=True) as image:
        width, height = image.size
        if image.format == "TIFF":  # newer Pillow gives the size after transposing
            width, height = (int(image.tag_v2[tag]) for tag in (256, 257))
        return _orientation(image), (height, width)


def upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    if _orientation(image) in (5, 6, 7, 8):
        width, height = _upright(image).size if image.format == "TIFF" else (height, width)
    return height, width


def has_more_pages(image: Image.Image) -> bool:
    """Whether a file has several pictures, not counting previews (MPO) and layers (PSD)."""
    try:
        return image.format not in ("MPO", "PSD") and getattr(image, "is_animated", False)
    except (IndexError, *_UNREADABLE):  # a GIF that is cut off after its first frame
        return False


def is_narrowed(image: Image.Image) -> bool:
    """Whether Pillow reads only 8 of 16 bits per channel of a PNG, TIFF, PPM or SGI file; known until it is loaded."""
    if image.mode not in ("CMYK", "LA", "RGB", "RGBA", "RGBX"):
        return False
    for codec, *_, how in getattr(image, "tile", None) or ():
        how = how if isinstance(how, tuple) else (how,)
        is_wide = ";16" in str(how[0]) and not str(how[0]).startswith("BGR")  # BGR;16 has 16 bits per pixel
        if is_wide or codec == "SGI16" or (codec in ("ppm", "ppm_plain") and how[-1] > 255):
            return True
    return False


def pil_to_array(image: Image.Image) -> tuple[np.ndarray, bool]:
    """Decode an image of any mode; return its pixels, and whether alpha was dropped.

    The pixels are (H, W) or (H, W, 3), of uint8, uint16, bool or float32, or int32 if their range is unknown. Pillow
    reads 16-bit colour files with 8 bits per channel, see `is_narrowed`.
    """
    is_16_bit = image.format in ("PNG", "PPM")  # some versions of Pillow give these as mode I, signed 32 bit
    has_alpha = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    image = _upright(image)
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    elif image.mode == "P" and has_alpha:
        image = image.convert("RGBA")
    if image.mode == "LA":
        image = image.convert("L")
    elif image.mode not in ("1", "L", "I", "F", "RGB") and not image.mode.startswith("I;16"):
        image = image.convert("RGB")
    pixels = np.asarray(image)
    return (pixels.astype(np.uint16) if image.mode == "I" and is_16_bit else pixels), has_alpha


def _unlock() -> None:
    """Renew the lock in a forked process, where a lock held by another thread would never be released."""
    global _LOADING
    _LOADING = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_unlock)
