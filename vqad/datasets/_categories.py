"""Layouts with a folder per category: training images, test images by kind of defect, and masks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from vqad._warn import warn
from vqad.datasets import _words
from vqad.datasets._collection import ImageDataset
from vqad.datasets._files import describe, existing_folder, image_files, left_out, some_of, subfolders

SPLITS = ("train", "test", "all")
Mask = Path | tuple[Path, ...]


@dataclass(frozen=True)
class Layout:
    """Names of the folders of a category, in any case.

    Normal images lie in folders named good, ok or the like; masks in a folder named ground_truth or the like, beside
    the folder of test images or in it. A mask, or a folder of several masks, is named after its image.
    """

    name: str
    loader: str
    test: tuple[str, ...] = ("test", "testing")
    validation: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ()
    # Folders of test images that only this layout has.
    own_kinds: tuple[str, ...] = ()
    train: tuple[str, ...] = ("train", "training")

    @property
    def folders(self) -> str:
        """The folders of a category, for messages."""
        validation = ", CATEGORY/validation/good" if self.validation else ""
        return f"CATEGORY/train/good{validation} and CATEGORY/{self.test[0]}/KIND"

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "validation", "test", "all") if self.validation else SPLITS


_VALIDATION = ("validation", "val", "valid")
MVTEC_AD = Layout("MVTec AD", "load_mvtec")
MVTEC_AD_2 = Layout(
    "MVTec AD 2",
    "load_mvtec_ad2",
    test=("test_public",),
    validation=_VALIDATION,
    unlabelled=("test_private", "test_private_mixed"),
)
MVTEC_LOCO = Layout(
    "MVTec LOCO AD",
    "load_mvtec_loco",
    validation=_VALIDATION,
    own_kinds=("logical_anomalies", "structural_anomalies"),
)
BTAD = Layout("BTAD", "load_btad")
MPDD = Layout("MPDD", "load_mpdd")


class _Row(NamedTuple):
    path: Path
    target: int
    category: str
    defect: str
    mask: Mask | None


@dataclass
class _Unpaired:
    """Images of defects without a mask, and masks without an image."""

    images: list[Path] = field(default_factory=list)
    masks: list[Path] = field(default_factory=list)


def load(
    layout: Layout, root: str | os.PathLike[str], categories: str | Sequence[str] | None, split: str
) -> ImageDataset:
    """List the images of a split of some categories; see `load_mvtec`."""
    if split not in layout.splits:
        raise ValueError(f"split must be one of {layout.splits}; got {split!r}.")
    folder = existing_folder(root)
    found = find_categories(folder, layout)
    if not found:
        raise ValueError(
            f"root {str(root)!r} does not have the layout of {layout.name}, {layout.folders}: it contains "
            f"{describe(folder)}. For plain folders of images use vqad.datasets.load_folder, for labels and masks "
            "vqad.datasets.load_labelled(normal=..., anomalous=..., masks=...)."
        )
    names = list(found) if categories is None else [categories] if isinstance(categories, str) else list(categories)
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ValueError(f"root {str(root)!r} has no category {unknown}; it has {list(found)}.")
    _warn_of_left_out(layout, folder, found, names, is_all=categories is None)
    rows: list[_Row] = []
    unpaired = _Unpaired()
    for name in names:
        if split in ("train", "all"):
            rows += _normal_rows(found[name], layout.train, name)
        if split in ("validation", "all"):
            rows += _normal_rows(found[name], layout.validation, name)
        if split in ("test", "all"):
            rows += _test_rows(found[name], layout, name, unpaired)
    if not rows:
        raise ValueError(
            f"root {str(root)!r} has no images for split={split!r} in the categories {names}.{_hint(layout, found)}"
        )
    without = unpaired.images if any(row.mask is not None for row in rows) else []
    if without or unpaired.masks:
        warn_of_unpaired(f"root {str(root)!r} has", folder, without, unpaired.masks)
    paths, target, category, defect, mask_paths = zip(*rows)
    return ImageDataset(paths, target=target, category=category, defect=defect, mask_paths=mask_paths)


def find_categories(folder: Path, layout: Layout) -> dict[str, Path]:
    """Category folders by name: those in `folder`, or `folder` itself; empty if it does not have the layout."""
    if _is_category(folder, layout):
        return {folder.resolve().name: folder}
    return {path.name: path for path in subfolders(folder) if _is_category(path, layout)}


def has_layout(folder: Path, layout: Layout) -> bool:
    """Whether a folder has the folders that tell this layout from the others."""
    found = find_categories(folder, layout).values()
    if layout.own_kinds:
        return any(_named(test, layout.own_kinds) for path in found for test in _named(path, layout.test))
    return any(_named(path, layout.test) for path in found) if layout.unlabelled else bool(found)


def is_masks(folder: Path) -> bool:
    """Whether a folder holds the masks of a category."""
    return _words.is_masks(folder.name) and any(
        _is_category(above, layout) and folder in _mask_folders(above, _named(above, layout.test))
        for above in (folder.parent, folder.parent.parent)
        for layout in (MVTEC_AD, MVTEC_AD_2)
    )


def match_masks(stems: Sequence[str], masks: dict[str, Mask]) -> tuple[list[Mask | None], list[str]]:
    """Match masks to images by their names without suffix; also returns the masks without an image.

    The mask of ``NNN`` is ``NNN_mask``, ``NNN`` or ``NNN_GT``, in this order, or another such name.
    """
    of_image = {_words.image_of_mask(name).casefold(): mask for name, mask in masks.items()}
    found = [masks.get(f"{stem}_mask", masks.get(stem, of_image.get(stem.casefold()))) for stem in stems]
    known = {stem.casefold() for stem in stems}
    orphans = [name for name in masks if not {name.casefold(), _words.image_of_mask(name).casefold()} & known]
    return found, orphans


def masks_in(folder: Path) -> dict[str, Mask]:
    """The masks in a folder by name: files, and folders of several files."""
    masks: dict[str, Mask] = {path.stem: path for path in image_files(folder)}
    for inner in subfolders(folder):
        if inside := tuple(image_files(inner)):
            masks[inner.name] = inside
    return masks


def _hint(layout: Layout, found: dict[str, Path]) -> str:
    for other in (MVTEC_AD_2, MVTEC_LOCO):
        if other.name != layout.name and any(has_layout(path, other) for path in found.values()):
            return f" They look like {other.name}: use vqad.datasets.{other.loader}."
    return ""


# ---- rows ----------------------------------------------------------------------------------------


def _normal_rows(folder: Path, split: Sequence[str], category: str) -> list[_Row]:
    kinds = [kind for inner in _named(folder, split) for kind in subfolders(inner) if _words.is_normal(kind.name)]
    return [_Row(path, 1, category, "good", None) for kind in kinds for path in image_files(kind)]


def _test_rows(folder: Path, layout: Layout, category: str, unpaired: _Unpaired) -> list[_Row]:
    tests = _named(folder, layout.test)
    places = _mask_folders(folder, tests)
    kinds = [kind for test in tests for kind in subfolders(test) if kind not in places]
    defects = [kind for kind in kinds if not _words.is_normal(kind.name)]
    masks = _masks_by_kind(places, [kind.name for kind in defects], unpaired)
    rows: list[_Row] = []
    for kind in kinds:
        images = image_files(kind)
        if _words.is_normal(kind.name):
            rows += [_Row(path, 1, category, "good", None) for path in images]
            continue
        own = masks.get(kind.name.casefold(), {})
        found, orphans = match_masks([path.stem for path in images], own)
        unpaired.masks += [_first(own[name]) for name in orphans]
        unpaired.images += [path for path, mask in zip(images, found) if mask is None]
        rows += [_Row(path, -1, category, kind.name, mask) for path, mask in zip(images, found)]
    return rows


def _mask_folders(folder: Path, tests: Sequence[Path]) -> list[Path]:
    """Folders of masks of a category: those with an unambiguous name, else beside the test images, else among them.

    A folder named label or mask among the test images may also be a kind of defect, whose masks are elsewhere.
    """
    beside = [path for path in subfolders(folder) if _words.is_masks(path.name)]
    inside = [path for test in tests for path in subfolders(test) if _words.is_masks(path.name)]
    sure = [path for path in (*beside, *inside) if _words.kind_of(path.name) == _words.MASKS]
    return sure or beside or [path for path in inside if _words.plain(path.name) in ("mask", "masks")]


def _masks_by_kind(places: Sequence[Path], defects: Sequence[str], unpaired: _Unpaired) -> dict[str, dict[str, Mask]]:
    """Masks of each kind of defect, by its name in lower case; masks of no kind are unpaired."""
    by_kind: dict[str, dict[str, Mask]] = {name.casefold(): {} for name in defects}
    for place in places:
        inside = {path.name.casefold(): path for path in subfolders(place)}
        if len(by_kind) == 1 and not inside:  # a single kind of defect needs no folder
            next(iter(by_kind.values())).update(masks_in(place))
            continue
        unpaired.masks += image_files(place)
        for name, path in inside.items():
            if name in by_kind:
                by_kind[name] |= masks_in(path)
            elif not _words.is_normal(name):
                unpaired.masks += image_files(path, recursive=True)
    return by_kind


def _first(mask: Mask) -> Path:
    return mask[0] if isinstance(mask, tuple) else mask


def _named(folder: Path, names: Sequence[str]) -> list[Path]:
    wanted = {_words.plain(name) for name in names}
    return [path for path in subfolders(folder) if _words.plain(path.name) in wanted] if folder.is_dir() else []


def _is_category(folder: Path, layout: Layout) -> bool:
    return any(
        _words.is_normal(kind.name)
        for split in _named(folder, (*layout.train, *layout.test))
        for kind in subfolders(split)
    )


# ---- what is not read ----------------------------------------------------------------------------


def warn_of_unpaired(where: str, folder: Path | None, images: Sequence[Path], masks: Sequence[Path]) -> None:
    """Warn about images of defects without a mask, and masks without an image."""
    said = []
    if n := len(images):
        said.append(
            f"{n} image{'s' * (n > 1)} of defects without a mask, where others have one ({some_of(images, folder)})"
        )
    if n := len(masks):
        said.append(f"{n} mask{'s' * (n > 1)} without an image ({some_of(masks, folder)})")
    warn(f"{where} {' and '.join(said)}: check whether their names match.")


def _warn_of_left_out(
    layout: Layout, folder: Path, found: dict[str, Path], names: Sequence[str], *, is_all: bool
) -> None:
    others: list[Path] = []
    outside = [] if not is_all or folder in found.values() else _beside(folder, found, others)
    for name in names:
        outside += _astray(found[name], layout)
        image_files(found[name], recursive=True, others=others)
    said = []
    if outside:
        said.append(f"images outside {layout.folders} too, left out here: {some_of(outside, folder)}")
    if others:
        said.append(left_out(others, folder))
    if said:
        warn(f"root {str(folder)!r} has {'; and '.join(said)}.")


def _beside(folder: Path, found: dict[str, Path], others: list[Path]) -> list[Path]:
    """Images beside the category folders, and other folders with images."""
    folders = [path for path in subfolders(folder) if path.name not in found]
    return image_files(folder, others=others) + [path for path in folders if image_files(path, recursive=True)]


def _astray(folder: Path, layout: Layout) -> list[Path]:
    """Images in a category's folder that are not read: outside the folders of the layout, or too deep in them."""
    tests = _named(folder, layout.test)
    places = _mask_folders(folder, tests)
    splits = _named(folder, (*layout.train, *layout.validation)) + tests
    beside = [image for each in (folder, *splits) for image in image_files(each)]
    for kind in (kind for split in splits for kind in subfolders(split)):
        if kind in places:
            continue
        is_read = kind.parent in tests or _words.is_normal(kind.name)
        for inner in subfolders(kind) if is_read else [kind]:
            beside += image_files(inner, recursive=True)
    known = [*splits, *places, *_named(folder, layout.unlabelled)]
    for path in subfolders(folder):
        if path not in known and image_files(path, recursive=True):
            beside.append(path)
    return beside
