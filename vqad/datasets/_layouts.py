"""Which layouts say by themselves what is normal and what is defective."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vqad.datasets import mvtec, visa
from vqad.datasets._collection import ImageDataset
from vqad.datasets._files import existing_folder, image_files, no_images
from vqad.datasets.mvtec import find_categories, load_mvtec
from vqad.datasets.visa import is_visa, load_visa


def loader_of(folder: Path) -> Callable[..., ImageDataset] | None:
    """`load_mvtec` or `load_visa` where a folder has that layout; None for other folders, and for what is none."""
    if folder.is_dir():
        if find_categories(folder):
            return load_mvtec
        if is_visa(folder):
            return load_visa
    return None


def images_but_masks(root: Path) -> list[Path]:
    """All images of a folder, at any depth and of whatever layout; masks are none."""
    masks: dict[Path, bool] = {existing_folder(root): False}

    def has_masks(folder: Path) -> bool:
        if folder not in masks:
            masks[folder] = mvtec.is_masks(folder) or visa.is_masks(folder) or has_masks(folder.parent)
        return masks[folder]

    images = [path for path in image_files(root, recursive=True) if not has_masks(path.parent)]
    if not images:
        raise no_images(root)
    return images
