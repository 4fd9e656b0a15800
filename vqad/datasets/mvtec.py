"""The folder layout of MVTec AD, which MPDD, BTAD and many others share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vqad._warn import warn
from vqad.datasets._collection import ImageDataset
from vqad.datasets._files import describe, existing_folder, image_files, subfolders

SPLITS = ("train", "test", "all")
NORMAL_KINDS = ("good", "ok")  # MVTec AD and MPDD, BTAD


def load_mvtec(
    root: str | os.PathLike[str], *, categories: str | Sequence[str] | None = None, split: str = "train"
) -> ImageDataset:
    """List the images of a folder in the layout of MVTec AD.

    The layout is ``CATEGORY/train/good``, ``CATEGORY/test/KIND`` and ``CATEGORY/ground_truth/KIND``, where
    the mask of ``NNN.png`` is ``NNN_mask.png`` or ``NNN.png``, with any image suffix. ``ok`` is taken for
    ``good`` (BTAD).

    Parameters
    ----------
    root : path-like
        Folder of categories, or the folder of a single category.
    categories : str or sequence of str, default=None
        Which categories, in this order; None: all of them, sorted.
    split : {"train", "test", "all"}, default="train"
        "train": the normal training images; "test": normal and defective test images; "all": both.

    Returns
    -------
    ImageDataset
        Category by category, first the training images. No image is opened.

    Raises
    ------
    ValueError
        If `root` has not this layout, an asked category is missing, or the split has no images.
    FileNotFoundError, NotADirectoryError
        If `root` is no folder.

    Warns
    -----
    UserWarning
        Of images and folders of images that lie beside the categories, and of images that lie beside the folders of a
        category or in folders within them.

    References
    ----------
    Bergmann et al., "MVTec AD: A Comprehensive Real-World Dataset for Unsupervised Anomaly Detection",
    CVPR 2019.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}; got {split!r}.")
    folder = existing_folder(root)
    found = find_categories(folder)
    if not found:
        raise ValueError(
            f"root {str(root)!r} has not the layout of MVTec AD, CATEGORY/train/good and CATEGORY/test/KIND: "
            f"it contains {describe(folder)}. For images in plain folders use vqad.datasets.load_folder."
        )
    names = list(found) if categories is None else [categories] if isinstance(categories, str) else list(categories)
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ValueError(f"root {str(root)!r} has no category {unknown}; it has {list(found)}.")

    outside = [] if categories is not None or _is_category(folder) else _beside(folder, found)
    if outside := [*outside, *(path for name in names for path in _astray(found[name]))]:
        listed = ", ".join(os.path.relpath(path, folder) for path in outside[:5])
        more = f" and {len(outside) - 5} more" if len(outside) > 5 else ""
        warn(
            f"root {str(root)!r} has images outside CATEGORY/train/good and CATEGORY/test/KIND too, left out here: "
            f"{listed}{more}."
        )
    rows: list[tuple[Path, int, str, str, Path | None]] = []
    for name in names:
        if split in ("train", "all"):
            rows += _train_rows(found[name], name)
        if split in ("test", "all"):
            rows += _test_rows(found[name], name)
    if not rows:
        raise ValueError(f"root {str(root)!r} has no images for split={split!r} in the categories {names}.")
    paths, target, category, defect, mask_paths = zip(*rows)
    return ImageDataset(paths, target=target, category=category, defect=defect, mask_paths=mask_paths)


def is_masks(folder: Path) -> bool:
    """Whether a folder is the one that has the masks of a category."""
    return folder.name == "ground_truth" and _is_category(folder.parent)


def find_categories(folder: Path) -> dict[str, Path]:
    """Find the category folders in `folder`, or `folder` itself, by name; empty if it has not the layout."""
    if _is_category(folder):
        return {folder.resolve().name: folder}
    return {path.name: path for path in subfolders(folder) if _is_category(path)}


def _beside(folder: Path, found: dict[str, Path]) -> list[Path]:
    """Images that lie beside categories, and folders with images that do."""
    others = [path for path in subfolders(folder) if path.name not in found]
    return image_files(folder) + [path for path in others if image_files(path, recursive=True)]


def _astray(folder: Path) -> list[Path]:
    """Images that lie in a category, but in none of the folders that are read: beside these, or in folders in them.

    Whole folders beside train and test, such as ``validation``, are splits of another kind.
    """
    splits = [folder / name for name in ("train", "test") if (folder / name).is_dir()]
    beside = [image for each in (folder, *splits) for image in image_files(each)]
    for kind in (kind for split in splits for kind in subfolders(split)):
        is_read = kind.parent.name == "test" or kind.name in NORMAL_KINDS
        for inner in subfolders(kind) if is_read else [kind]:
            beside += image_files(inner, recursive=True)
    return beside


def _is_category(folder: Path) -> bool:
    parts = [folder / split / kind for split in ("train", "test") for kind in NORMAL_KINDS]
    return any(part.is_dir() for part in parts)


def _train_rows(folder: Path, category: str) -> list[tuple[Path, int, str, str, Path | None]]:
    kinds = [folder / "train" / kind for kind in NORMAL_KINDS]
    return [(path, 1, category, "good", None) for kind in kinds if kind.is_dir() for path in image_files(kind)]


def _test_rows(folder: Path, category: str) -> list[tuple[Path, int, str, str, Path | None]]:
    if not (folder / "test").is_dir():
        return []
    rows: list[tuple[Path, int, str, str, Path | None]] = []
    for kind in subfolders(folder / "test"):
        if kind.name in NORMAL_KINDS:
            rows += [(path, 1, category, "good", None) for path in image_files(kind)]
            continue
        mask_folder = folder / "ground_truth" / kind.name
        masks = {path.stem: path for path in image_files(mask_folder)} if mask_folder.is_dir() else {}
        for path in image_files(kind):
            mask = masks.get(f"{path.stem}_mask", masks.get(path.stem))
            rows.append((path, -1, category, kind.name, mask))
    return rows
