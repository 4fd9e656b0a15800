"""The layout of KolektorSDD2: masks beside the images, and labels only in the masks."""

from __future__ import annotations

import os
from pathlib import Path

from vqad._decode import read_mask
from vqad._warn import warn
from vqad.datasets import _words
from vqad.datasets._categories import SPLITS
from vqad.datasets._collection import ImageDataset
from vqad.datasets._files import describe, existing_folder, image_files, left_out, some_of, subfolders


def load_ksdd2(root: str | os.PathLike[str], *, split: str = "train") -> ImageDataset:
    """List the images of KolektorSDD2 as it is distributed.

    The layout is ``train/NNNNN.png`` and ``test/NNNNN.png``, each with its mask ``NNNNN_GT.png``. An image is normal if
    its mask is black, so the masks are read.

    Parameters
    ----------
    root : path-like
        The folder that contains ``train`` and ``test``.
    split : {"train", "test", "all"}, default="train"
        "train": the normal images of ``train``, which also has defective ones; "test": all images of ``test``; "all":
        all images of both.

    Returns
    -------
    ImageDataset
        In natural order of the names, those of ``train`` first; ``category`` is the name of `root`.

    Raises
    ------
    ValueError
        If `root` does not have this layout, a mask cannot be read, or the split has no images.
    FileNotFoundError, NotADirectoryError
        If `root` is not a folder.

    Warns
    -----
    UserWarning
        When images without a mask, masks without an image, or files whose names are not those of images are left out.

    References
    ----------
    Božič, Tabernik & Skočaj, "Mixed supervision for surface-defect detection: from weakly to fully supervised
    learning", Computers in Industry 129, 2021.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}; got {split!r}.")
    folder = existing_folder(root)
    if not is_ksdd2(folder):
        raise ValueError(
            f"root {str(root)!r} does not have the layout of KolektorSDD2, train/NNNNN.png and train/NNNNN_GT.png, and "
            f"the same in test: it contains {describe(folder)}. For other layouts use vqad.datasets.load_labelled."
        )
    pairs: list[tuple[Path, Path, bool]] = []
    unpaired: list[Path] = []
    others: list[Path] = []
    for name in ("train", "test") if split == "all" else (split,):
        for place in _named(folder, name):
            found, alone = _pairs(place, others)
            marked = [bool(read_mask(str(mask)).any()) for _, mask in found]
            pairs += [(*pair, is_bad) for pair, is_bad in zip(found, marked) if split != "train" or not is_bad]
            unpaired += alone
    said = []
    if unpaired:
        said.append(f"{len(unpaired)} unpaired images or masks, left out here: {some_of(unpaired, folder)}")
    if others:
        said.append(left_out(others, folder))
    if said:
        warn(f"root {str(root)!r} has {'; and '.join(said)}.")
    if not pairs:
        raise ValueError(f"root {str(root)!r} has no images for split={split!r}.")
    return ImageDataset(
        [image for image, _, _ in pairs],
        target=[-1 if is_bad else 1 for *_, is_bad in pairs],
        category=folder.resolve().name,
        mask_paths=[mask if is_bad else None for _, mask, is_bad in pairs],
    )


def is_ksdd2(folder: Path) -> bool:
    """Whether the folder train or test in a folder has masks beside its images."""
    return any(_pairs(place, [])[0] for name in ("train", "test") for place in _named(folder, name))


def _named(folder: Path, name: str) -> list[Path]:
    return [path for path in subfolders(folder) if path.name.casefold() == name]


def _pairs(folder: Path, others: list[Path]) -> tuple[list[tuple[Path, Path]], list[Path]]:
    """Images with their masks, and the unpaired files."""
    files = image_files(folder, others=others)
    images: dict[str, Path] = {}
    masks: dict[str, Path] = {}
    for path in files:
        name = _words.image_of_mask(path.stem)
        (images if name == path.stem else masks)[name.casefold()] = path
    alone = [path for name, path in [*images.items(), *masks.items()] if not (name in images and name in masks)]
    return [(path, masks[name]) for name, path in images.items() if name in masks], alone
