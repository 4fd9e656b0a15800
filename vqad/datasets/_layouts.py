"""Recognising the layout of a folder, and checking that a plain folder holds only one kind of image."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from vqad._warn import warn
from vqad.datasets import _by_names, _categories, _words, ksdd2, mvtec, visa
from vqad.datasets._collection import ImageDataset
from vqad.datasets._files import existing_folder, image_files, left_out, no_images, some_of, subfolders

# The first that matches is used: folders in the layout of MVTec AD 2 and MVTec LOCO AD also match that of MVTec AD.
LAYOUTS: tuple[tuple[Callable[[Path], bool], Callable[..., ImageDataset]], ...] = (
    (lambda folder: _categories.has_layout(folder, _categories.MVTEC_AD_2), mvtec.load_mvtec_ad2),
    (lambda folder: _categories.has_layout(folder, _categories.MVTEC_LOCO), mvtec.load_mvtec_loco),
    (lambda folder: _categories.has_layout(folder, _categories.MVTEC_AD), mvtec.load_mvtec),
    (visa.is_visa, visa.load_visa),
    (ksdd2.is_ksdd2, ksdd2.load_ksdd2),
)


def loader_of(folder: Path) -> Callable[..., ImageDataset] | None:
    """The loader for a folder whose layout or names label its images; None for other folders and paths."""
    if loader := loader_of_layout(folder):
        return loader
    return _by_names.load_by_names if folder.is_dir() and _by_names.is_labelled(folder) else None


def loader_of_layout(folder: Path) -> Callable[..., ImageDataset] | None:
    """The loader for the layout of a folder; None for other folders and paths."""
    if folder.is_dir():
        for has_layout, loader in LAYOUTS:
            if has_layout(folder):
                return loader
    return None


def images_but_masks(root: Path) -> list[Path]:
    """All images of a folder, at any depth and in any layout, without masks.

    A warning lists folders and files that are masks judging by their names, and files that are not images.
    """
    masks: dict[Path, bool] = {existing_folder(root): False}
    by_name: list[Path] = []
    others: list[Path] = []

    def has_masks(folder: Path) -> bool:
        if folder not in masks:
            masks[folder] = _categories.is_masks(folder) or visa.is_masks(folder) or has_masks(folder.parent)
            if not masks[folder] and _is_called_masks(folder):
                masks[folder] = True
                by_name.append(folder)
        return masks[folder]

    images = [path for path in image_files(root, recursive=True, others=others) if not has_masks(path.parent)]
    beside = set(masks_beside(images))
    images = [path for path in images if path not in beside]
    if not images:
        raise no_images(root)
    said = []
    if left := [*by_name, *sorted(beside)]:
        said.append(f"masks by their names, left out here: {some_of(left, root)}")
    above = {parent for path in images for parent in path.parents if parent != root and parent.is_relative_to(root)}
    if taken := sorted(path for path in above if _words.kind_of(path.name) == _words.MASKS):
        said.append(
            f"folders named like masks but without the images they belong to, taken for images: {some_of(taken, root)}"
        )
    if others:
        said.append(left_out(others, root))
    if said:
        warn(f"{str(root)!r} has {'; and '.join(said)}.")
    return images


def check_names(folder: Path, images: Sequence[Path], target: int) -> None:
    """Raise ValueError if names say that the images of a folder have different labels; warn if names may say so.

    `images` are all image files in it, at any depth.
    """
    for above, counts in _folders_beside_each_other(folder, images).items():
        said = _words.telling(counts)
        if set(said.values()) - ({_words.ANOMALOUS} if target == -1 else set()):
            raise _labelled_by_hand(above, said, counts)
        doubtful = [name for name in counts if target == 1 and _words.is_doubtful(name)]
        if doubtful:
            warn(
                f"root {str(above)!r} has folders named {', '.join(map(repr, doubtful))}, which are taken for "
                "categories of normal images: leave them out if they hold defects, masks or test images."
            )
    if beside := masks_beside(images):
        raise ValueError(
            f"root {str(folder)!r} has {len(beside)} of {len(images)} images that are named like masks of others, such "
            f"as {beside[0].name!r} for {_words.image_of_mask(beside[0].stem)!r}: pass lists or patterns of images and "
            "masks to vqad.datasets.load_labelled."
        )
    _check_names_of_files(folder, images, target)


def masks_beside(images: Sequence[Path]) -> list[Path]:
    """Images that are named like masks of others in their folder, such as ``012_GT.png`` beside ``012.png``."""
    known = {(path.parent, path.stem) for path in images}
    beside = []
    for path in images:
        name = _words.image_of_mask(path.stem)
        if name != path.stem and (path.parent, name) in known:
            beside.append(path)
    return beside


def _is_called_masks(folder: Path) -> bool:
    if not _words.is_masks(folder.name):
        return False
    return folder.name in _words.masks_among([path.name for path in subfolders(folder.parent)])


def _folders_beside_each_other(folder: Path, images: Sequence[Path]) -> dict[Path, Counter[str]]:
    """For each folder with subfolders, the number of images in each subfolder, at any depth."""
    counts: dict[Path, Counter[str]] = {}
    for path in images:
        above = folder
        for part in path.relative_to(folder).parts[:-1]:
            counts.setdefault(above, Counter())[part] += 1
            above = above / part
    return counts


def _labelled_by_hand(folder: Path, said: dict[str, str], counts: Counter[str]) -> ValueError:
    listed = ", ".join(f"{name} ({counts[name]} images)" for name in counts if name in said)
    text = f"root {str(folder)!r} has folders whose names say that not all images are normal: {listed}."
    of = {kind: [os.path.join(folder, name) for name in counts if said.get(name) == kind] for kind in said.values()}
    first = next((of[kind][0] for kind in (_words.NORMAL, _words.TRAIN) if kind in of), None)
    text += " Pass only the folder of normal images" + (f", such as {first!r}" if first else "")
    given = [
        f"{kind}={of[kind] if len(of[kind]) > 1 else of[kind][0]!r}"
        for kind in (_words.NORMAL, _words.ANOMALOUS, _words.MASKS)
        if kind in of
    ]
    if given:
        text += f"; with labels and masks: vqad.datasets.load_labelled({', '.join(given)})"
    return ValueError(f"{text}.")


def _check_names_of_files(folder: Path, images: Sequence[Path], target: int) -> None:
    kinds = {path: _words.kind_of_file(path.stem) for path in images}
    normal = [path for path, kind in kinds.items() if kind == _words.NORMAL]
    anomalous = [path for path, kind in kinds.items() if kind == _words.ANOMALOUS]
    if normal and anomalous:
        raise ValueError(
            f"root {str(folder)!r} has images whose names say that not all are normal: {len(normal)} such as "
            f"{normal[0].name!r}, {len(anomalous)} such as {anomalous[0].name!r}. Pass lists or patterns of each kind "
            "to vqad.datasets.load_labelled."
        )
    if anomalous and target == 1:
        warn(
            f"root {str(folder)!r} has {len(anomalous)} images whose names say that they are not normal, but they are "
            f"taken as normal: {some_of(anomalous, folder)}."
        )
