"""Which layouts say by themselves what is normal and what is defective."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vqad.datasets._collection import ImageDataset
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
