"""Folders whose names label the images: OK and NG, good and bad, masks; for the command, which only gets a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path

from vqad._warn import warn
from vqad.datasets import _words
from vqad.datasets._collection import ImageDataset
from vqad.datasets._files import image_files, product_of, some_of, subfolders
from vqad.datasets.labelled import load_labelled


def is_labelled(folder: Path) -> bool:
    """Whether the folders in a folder, or in each of its folders, are named after normal and anomalous images."""
    return bool(_labelled(folder))


def load_by_names(root: str | os.PathLike[str], *, split: str = "train") -> ImageDataset:
    """List the images of folders named good and bad, OK and NG or the like, with their masks.

    Parameters
    ----------
    root : path-like
        A folder for which `is_labelled` holds, with one product or several.
    split : {"train", "test"}, default="train"
        "train": the normal images; "test": all, with their masks.

    Returns
    -------
    ImageDataset
        ``category`` is the name of the folder that contains the folder of normal images and the others.

    Warns
    -----
    UserWarning
        When folders are left out; with "test", because its normal images are those of "train".
    """
    folder = Path(root)
    parts, left = [], []
    for name, named in _labelled(folder).items():
        normal = named[_words.NORMAL]
        rest = {kind: places for kind, places in named.items() if kind != _words.NORMAL and split == "test"}
        parts.append(load_labelled(normal, **rest, category=name))
        left += [place for kind, places in named.items() if kind not in (_words.NORMAL, *rest) for place in places]
    if left:
        warn(f"root {str(root)!r} has folders that are not of normal images, left out: {_each(left, folder)}.")
    if split == "test":
        warn(
            f"root {str(root)!r} does not split normal images into training and test images: a detector that learned "
            "from them raises too few false alarms on them. Use the layout of MVTec AD to split them."
        )
    return reduce(add, parts)


def _labelled(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """For each product the folders of each kind; empty unless names tell the kind of all folders."""
    if found := _told(folder):
        return {product_of(folder.resolve()): found}
    products = {path.name: _told(path) for path in subfolders(folder)}
    return products if products and all(products.values()) and not image_files(folder) else {}


def _told(folder: Path) -> dict[str, list[Path]]:
    places = {path.name: path for path in subfolders(folder) if image_files(path, recursive=True)}
    said = _words.telling(places)
    named: dict[str, list[Path]] = {}
    for name, kind in said.items():
        named.setdefault(kind, []).append(places[name])
    is_whole = len(said) == len(places) and _words.NORMAL in named and not image_files(folder)
    return named if is_whole and not {_words.TRAIN, _words.TEST} & named.keys() else {}


def _each(places: Sequence[Path], folder: Path) -> str:
    n = [len(image_files(place, recursive=True)) for place in places]
    return ", ".join(f"{some_of([place], folder)} ({k} image{'s' * (k != 1)})" for place, k in zip(places, n))
