"""Images whose labels the caller gives, wherever they lie."""

from __future__ import annotations

import glob
import os
from collections.abc import Container, Iterable
from pathlib import Path

from vqad._decode import not_there
from vqad._warn import warn
from vqad.datasets import _words
from vqad.datasets._categories import warn_of_unpaired
from vqad.datasets._collection import ImageDataset
from vqad.datasets._files import image_files, image_suffixes, left_out, natural_key

Places = str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | None


def load_labelled(
    normal: Places = (), anomalous: Places = (), masks: Places = (), *, category: str = "images"
) -> ImageDataset:
    """List normal and anomalous images with their masks.

    Each of the three arguments is a folder, whose images at any depth are used; a file; a pattern such as
    ``"parts/*_ok.png"``, in which ``**`` stands for folders at any depth; or a list of these. The mask of ``NNN.png``
    is named ``NNN_mask.png``, ``NNN.png`` or ``NNN_GT.png``, with any suffix, or lies in a folder ``NNN`` of its
    image's masks. If images in several folders have the same name, such as ``scratch/000.png`` and ``dent/000.png``,
    their masks must lie in folders with the names of these folders. For masks with other names pass their paths:
    ``ImageDataset(paths, mask_paths=...)``.

    Parameters
    ----------
    normal, anomalous : path-like, or iterable of path-like, default=()
        Images without and with a defect.
    masks : path-like, or iterable of path-like, default=()
        Mask files, black where there is no defect.
    category : str, default="images"
        Kind of object. Add collections for several kinds: ``load_labelled(...) + load_labelled(...)``.

    Returns
    -------
    ImageDataset
        Normal images first, in the order given; those of a folder or pattern in natural order. For an anomaly found in
        a folder, ``defect`` is the name of its folder, unless that is NG, bad or the like. No image is opened.

    Raises
    ------
    ValueError
        If there are no images, a pattern or folder has none, an image is given twice, or a mask may belong to several
        images.
    FileNotFoundError
        If a path does not exist.

    Warns
    -----
    UserWarning
        When anomalous images have no mask although others have one, when masks have no image, and when files are left
        out because their names are not those of images.
    """
    if not isinstance(category, str):
        raise TypeError(f"category must be a str; got {category!r}. Add collections of several categories.")
    good, bad = _listed(normal, "normal"), _listed(anomalous, "anomalous")
    marks = _listed(masks, "masks")
    if not good and not bad:
        raise ValueError("normal and anomalous have no images: give folders, patterns or lists of image files.")
    _check_given_once({"normal": good, "anomalous": bad, "masks": marks})
    found = masks_of(list(bad), list(marks), list(good))
    kinds = [_kind(path, place) for path, place in bad.items()]
    return ImageDataset(
        [*good, *bad],
        target=[1] * len(good) + [-1] * len(bad),
        category=category,
        defect=["good"] * len(good) + kinds,
        mask_paths=[None] * len(good) + found,
    )


# Files, each with the folder in which it was found, or None.
Found = dict[Path, Path | None]


def _listed(places: Places, name: str) -> Found:
    given = [places] if isinstance(places, (str, os.PathLike)) else [] if places is None else list(places)
    found: Found = {}
    others: list[Path] = []
    for place in given:
        if not isinstance(place, (str, os.PathLike)):
            raise TypeError(f"{name} must be paths of folders or files, or patterns; got {place!r}.")
        inside = _files_of(os.fspath(place), name, others)
        if twice := [path for path in inside if path in found]:
            raise ValueError(f"{name} has {str(twice[0])!r} twice: give each image once.")
        found |= inside
    if others:
        warn(f"{name} has {left_out(others, None)}.")
    return found


def _files_of(place: str, name: str, others: list[Path]) -> Found:
    path = Path(place)
    if path.is_dir():
        images: Found = dict.fromkeys(image_files(path, recursive=True, others=others), path)
    elif os.path.lexists(path):
        return {path: None}
    elif glob.has_magic(place):
        matches = [Path(match) for match in glob.glob(place, recursive=True)]
        files = sorted((path for path in matches if path.is_file()), key=lambda path: (path.parent, natural_key(path)))
        suffixes = image_suffixes()
        images = dict.fromkeys((path for path in files if path.suffix.lower() in suffixes), None)
        others += [path for path in files if path not in images]
        for match in matches:  # the pattern matches folders
            if match.is_dir() and "**" not in place:
                images |= dict.fromkeys(image_files(match, recursive=True, others=others), match.parent)
    else:
        raise not_there(place, f"{name}: {place!r}")
    if not images:
        raise ValueError(f"{name}: {place!r} has no images.")
    return images


def _kind(path: Path, place: Path | None) -> str:
    name = path.parent.name
    return "defect" if place is None or _words.kind_of(name) == _words.ANOMALOUS else name


def _check_given_once(given: dict[str, Found]) -> None:
    seen: dict[str, str] = {}
    for name, found in given.items():
        for path in found:
            real = os.path.realpath(path)
            if seen.setdefault(real, name) != name:
                raise ValueError(f"{str(path)!r} is in both {seen[real]} and {name}: give each image once.")


# ---- masks ---------------------------------------------------------------------------------------


def masks_of(images: list[Path], marks: list[Path], normal: list[Path]) -> list[tuple[Path, ...] | Path | None]:
    """The masks of each anomalous image, matched by name, and by the names of folders if names are ambiguous."""
    by_stem: dict[str, list[int]] = {}
    for i, path in enumerate(images):
        by_stem.setdefault(path.stem.casefold(), []).append(i)
    found: list[tuple[Path, ...]] = [()] * len(images)
    of_normal = {path.stem.casefold() for path in normal}
    alone = []
    for mask in marks:
        name, folder = _belongs_to(mask, by_stem.keys() | of_normal)
        owners = by_stem.get(name, [])
        if len(owners) > 1:
            owners = _only_in(folder, owners, images, mask)
        for i in owners:
            found[i] = (*found[i], mask)
        if not owners and name not in of_normal:  # normal images may have black masks
            alone.append(mask)
    without = [path for path, mask in zip(images, found) if not mask]
    if alone or (any(found) and without):
        warn_of_unpaired("the images and masks given have", None, without, alone)
    return [mask[0] if len(mask) == 1 else mask or None for mask in found]


def _belongs_to(mask: Path, stems: Container[str]) -> tuple[str, str]:
    """The stem of the image that a mask belongs to, and the name of the folder that resolves ambiguous stems."""
    above = mask.parent.name.casefold()
    if above in stems:  # a folder with the masks of one image
        return above, mask.parent.parent.name.casefold()
    stem, image = mask.stem.casefold(), _words.image_of_mask(mask.stem).casefold()
    return image if image in stems else stem, above


def _only_in(folder: str, owners: list[int], images: list[Path], mask: Path) -> list[int]:
    inside = [i for i in owners if images[i].parent.name.casefold() == folder]
    if len(inside) != 1:
        raise ValueError(
            f"mask {str(mask)!r} may belong to {str(images[owners[0]])!r} or to {str(images[owners[1]])!r}: put masks "
            "in folders with the names of their images' folders, or pass the masks as "
            "ImageDataset(paths, mask_paths=...)."
        )
    return inside
