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


def image_files(folder: Path, *, recursive: bool = False, within: Path | None = None) -> list[Path]:
    """List the image files of a folder in natural order; hidden files and folders are skipped.

    With `recursive`, the files of a folder come before those of its subfolders, and these before those of links to
    folders. Each folder is read once; a link that leads to another place in `within`, by default `folder`, is not
    followed. A broken link is listed: what it leads to was to be an image.
    """
    top = folder.resolve()
    return _listed(folder, recursive, (folder if within is None else within).resolve(), {top, *top.parents})


def _listed(folder: Path, recursive: bool, root: Path, seen: set[Path]) -> list[Path]:
    entries = _visible(folder)
    images = [path for path in entries if path.suffix.lower() in IMAGE_SUFFIXES]
    files = [path for path in images if path.is_file() or not path.exists()]
    for path in sorted(subfolders(folder), key=Path.is_symlink) if recursive else []:
        real = path.resolve()
        if real not in seen and not (path.is_symlink() and _is_shown(real, root)):
            seen.add(real)
            files += _listed(path, True, root, seen)
    return files


def _is_shown(path: Path, root: Path) -> bool:
    """Whether a path lies in a folder, and in none that is hidden in it."""
    return path.is_relative_to(root) and not any(part.startswith(".") for part in path.relative_to(root).parts)


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


def no_images(root: str | os.PathLike[str]) -> ValueError:
    suffixes = " ".join(sorted(IMAGE_SUFFIXES))
    return ValueError(f"root {str(root)!r} has no images ({suffixes}); it contains {describe(Path(root))}.")


def _visible(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=natural_key)
