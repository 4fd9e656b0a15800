"""What every folder layout needs: which files are images, and in which order."""

from __future__ import annotations

import os
import re
from pathlib import Path

from vqad._decode import not_there

IMAGE_SUFFIXES = frozenset(
    (
        ".avif",
        ".bmp",
        ".gif",
        ".jp2",
        ".jpeg",
        ".jpg",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    )
)


def natural_key(path: Path) -> list[tuple[int, str]]:
    """Sort key that puts ``part-2`` before ``part-10``."""
    return [(int(piece) if piece.isdecimal() else -1, piece) for piece in re.split(r"(\d+)", path.name)]


def image_files(folder: Path, *, recursive: bool = False) -> list[Path]:
    """List the image files of a folder in natural order; hidden files and folders are skipped.

    With `recursive`, the files of a folder come before those of its subfolders, links to folders included, and each
    folder is read once. A broken link is listed: what it leads to was to be an image.
    """
    top = folder.resolve()
    return _listed(folder, recursive, {top, *top.parents})


def _listed(folder: Path, recursive: bool, seen: set[Path]) -> list[Path]:
    entries = _visible(folder)
    images = [path for path in entries if path.suffix.lower() in IMAGE_SUFFIXES]
    files = [path for path in images if path.is_file() or not path.exists()]
    for path in subfolders(folder) if recursive else []:
        if (real := path.resolve()) not in seen:
            seen.add(real)
            files += _listed(path, True, seen)
    return files


def subfolders(folder: Path) -> list[Path]:
    """List the folders in a folder in natural order, without hidden ones and links to it or further up."""
    above = {folder.resolve(), *folder.resolve().parents}
    return [p for p in _visible(folder) if p.is_dir() and not (p.is_symlink() and p.resolve() in above)]


def existing_folder(root: str | os.PathLike[str]) -> Path:
    """Give `root` as a Path, or say what is wrong with it."""
    path = Path(root)
    if not path.exists():
        raise not_there(path, f"root {str(root)!r}")
    if not path.is_dir():
        raise NotADirectoryError(f"root {str(root)!r} is a file; a folder of images is expected.")
    return path


def describe(folder: Path) -> str:
    """Say in a few words what is in a folder, for error messages."""
    names = [path.name + ("/" if path.is_dir() else "") for path in _visible(folder)]
    if not names:
        return "nothing"
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _visible(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=natural_key)
