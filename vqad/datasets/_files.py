"""Image files in folders: which files are images, and in which order."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from vqad._decode import not_there
from vqad.datasets import _words

# Listed even if this Pillow cannot read them, so that reading raises an error; .mpo is read as JPEG.
_ALWAYS = frozenset(
    (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".mpo", ".png", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
)
# Formats that Pillow registers but can read only with the help of other programs.
_NO_PICTURES = frozenset(("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"))
# Suffixes of other files that are common in folders of images.
_TEXTS = ".txt .md .rst .csv .tsv .json .jsonl .xml .yaml .yml .toml .pdf .html .htm .log .doc .docx .xls .xlsx .ods"
_OTHERS = ".db .ini .py .ipynb .sh .bat .lnk .url .zip .gz .xz .bz2 .tar .tgz .7z .rar .md5 .sha256 .pkl .pyb"
_COMPANIONS = frozenset((*_TEXTS.split(), *_OTHERS.split()))
_DOCUMENTS = re.compile(
    r"readme|licen[cs]e|copying|notice|authors|changelog|makefile|md5sums?|sha256sums?", re.IGNORECASE
)


def image_suffixes() -> frozenset[str]:
    """Suffixes of image files: all that Pillow reads, with the plug-ins registered now."""
    Image.init()
    return _ALWAYS | {
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in _NO_PICTURES
    }


def natural_key(path: Path) -> list[tuple[int, str]]:
    """Sort key that puts ``part-2`` before ``part-10``."""
    return [(int(piece) if piece.isdecimal() else -1, piece) for piece in re.split(r"(\d+)", path.name)]


def image_files(
    folder: Path, *, recursive: bool = False, within: Path | None = None, others: list[Path] | None = None
) -> list[Path]:
    """List the image files of a folder in natural order; hidden files and folders are skipped.

    With `recursive`, the files of a folder come before those of its subfolders, and these before those of links to
    folders. Each folder is read once; a link to another place in `within`, by default `folder`, is not followed. Broken
    links are listed, so that reading them raises an error. Files that have neither the suffix of an image nor that of a
    text or table are appended to `others`.
    """
    top = folder.resolve()
    others = [] if others is None else others
    return _listed(folder, recursive, (folder if within is None else within).resolve(), {top, *top.parents}, others)


def _listed(folder: Path, recursive: bool, root: Path, seen: set[Path], others: list[Path]) -> list[Path]:
    entries, suffixes = _visible(folder), image_suffixes()
    images = [path for path in entries if path.suffix.lower() in suffixes]
    files = [path for path in images if path.is_file() or not path.exists()]
    others += [path for path in entries if path.suffix.lower() not in suffixes and _may_be_an_image(path)]
    for path in sorted(subfolders(folder), key=Path.is_symlink) if recursive else []:
        real = path.resolve()
        if real not in seen and not (path.is_symlink() and _is_shown(real, root)):
            seen.add(real)
            files += _listed(path, True, root, seen, others)
    return files


def _may_be_an_image(path: Path) -> bool:
    is_text = path.suffix.lower() in _COMPANIONS or (not path.suffix and _DOCUMENTS.match(path.name))
    return not is_text and path.is_file()


def _is_shown(path: Path, root: Path) -> bool:
    """Whether a path lies in a folder, but not in a hidden one inside it."""
    return path.is_relative_to(root) and not any(part.startswith(".") for part in path.relative_to(root).parts)


def subfolders(folder: Path) -> list[Path]:
    """List the folders in a folder in natural order, without hidden ones and links to it or to its parents."""
    above = {folder.resolve(), *folder.resolve().parents}
    with os.scandir(folder) as entries:  # which does not look up every file: folders may hold many images
        found = [folder / entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry)]
    return [p for p in sorted(found, key=natural_key) if not (p.is_symlink() and p.resolve() in above)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()  # a link may lead to itself


def existing_folder(root: str | os.PathLike[str]) -> Path:
    """`root` as a Path; raises if it is not a folder."""
    path = Path(root)
    if not path.exists():
        raise not_there(path, f"root {str(root)!r}")
    if not path.is_dir():
        raise NotADirectoryError(f"root {str(root)!r} is a file, but a folder of images is expected.")
    return path


def product_of(folder: Path) -> str:
    """The name of a folder, or of the nearest one above it that is not named good, bad, train or the like.

    A category is a kind of object: "good" as the category of a defective image would mislead.
    """
    folder = Path(os.path.abspath(folder))  # a link keeps its own name
    names = (path.name for path in (folder, *folder.parents) if path.name)
    return next((name for name in names if not _words.is_no_product(name)), "images")


def describe(folder: Path) -> str:
    """The first few entries of a folder, for error messages."""
    names = [path.name + ("/" if path.is_dir() else "") for path in _visible(folder)]
    if not names:
        return "nothing"
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def some_of(paths: Sequence[Path], folder: Path | None) -> str:
    """The first few paths, relative to a folder if there is one, and how many more there are."""
    listed = ", ".join(Path(path if folder is None else os.path.relpath(path, folder)).as_posix() for path in paths[:5])
    return listed + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")


def left_out(others: Sequence[Path], folder: Path | None) -> str:
    """Part of a warning: files that were not taken for images."""
    n = f"{len(others)} file{'' if len(others) == 1 else 's'}"
    return f"{n} without the suffix of an image format that Pillow reads, left out here: {some_of(others, folder)}"


def no_images(root: str | os.PathLike[str]) -> ValueError:
    return ValueError(
        f"root {str(root)!r} has no images (.png, .jpg, .tif, .bmp and other suffixes that Pillow reads); it contains "
        f"{describe(Path(root))}."
    )


def _visible(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=natural_key)
