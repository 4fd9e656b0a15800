"""The layout of MVTec AD, which many data sets share, and those of its successors."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vqad.datasets import _categories
from vqad.datasets._collection import ImageDataset


def load_mvtec(
    root: str | os.PathLike[str], *, categories: str | Sequence[str] | None = None, split: str = "train"
) -> ImageDataset:
    """List the images of a folder in the layout of MVTec AD.

    The layout is ``CATEGORY/train/good``, ``CATEGORY/test/KIND`` and ``CATEGORY/ground_truth/KIND``. The mask of
    ``NNN.png`` is ``NNN_mask.png``, ``NNN.png`` or ``NNN_GT.png``, with any image suffix, or the union of all images in
    a folder ``NNN``. Names of folders may be in upper case; ``ok`` and ``normal`` are taken as ``good``, and ``masks``
    as ``ground_truth``.

    Parameters
    ----------
    root : path-like
        Folder of categories, or the folder of a single category.
    categories : str or sequence of str, default=None
        Categories to list, in this order; None: all, sorted.
    split : {"train", "test", "all"}, default="train"
        "train": the normal training images; "test": normal and defective test images; "all": both.

    Returns
    -------
    ImageDataset
        Category by category, training images first. No image is opened.

    Raises
    ------
    ValueError
        If `root` does not have this layout, a requested category is missing, or the split has no images.
    FileNotFoundError, NotADirectoryError
        If `root` is not a folder.

    Warns
    -----
    UserWarning
        When images are left out because they lie outside the folders above, when files are left out because their
        names are not those of images, when images of defects have no mask although others have one, and when masks
        have no image.

    References
    ----------
    Bergmann et al., "MVTec AD: A Comprehensive Real-World Dataset for Unsupervised Anomaly Detection",
    CVPR 2019.
    """
    return _categories.load(_categories.MVTEC_AD, root, categories, split)


def load_mvtec_ad2(
    root: str | os.PathLike[str], *, categories: str | Sequence[str] | None = None, split: str = "train"
) -> ImageDataset:
    """List the images of MVTec AD 2 as it is distributed.

    The layout is ``CATEGORY/train/good``, ``CATEGORY/validation/good``, ``CATEGORY/test_public/KIND`` and
    ``CATEGORY/test_public/ground_truth/KIND``. The labels of ``test_private`` and ``test_private_mixed`` are secret:
    list these images with `load_folder`.

    Parameters
    ----------
    root : path-like
        Folder of categories, or the folder of a single category.
    categories : str or sequence of str, default=None
        Categories to list, in this order; None: all, sorted.
    split : {"train", "validation", "test", "all"}, default="train"
        "train", "validation": normal images; "test": those of ``test_public``, normal and defective; "all": all three.

    Returns
    -------
    ImageDataset
        Category by category. No image is opened. Errors and warnings are those of `load_mvtec`.

    References
    ----------
    Heckler-Kram, Neudeck, Scheler, König & Steger, "The MVTec AD 2 Dataset: Advanced Scenarios for Unsupervised Anomaly
    Detection", 2025. arXiv:2503.21622.
    """
    return _categories.load(_categories.MVTEC_AD_2, root, categories, split)


def load_mvtec_loco(
    root: str | os.PathLike[str], *, categories: str | Sequence[str] | None = None, split: str = "train"
) -> ImageDataset:
    """List the images of MVTec LOCO AD as it is distributed.

    The layout is ``CATEGORY/train/good``, ``CATEGORY/validation/good``, ``CATEGORY/test/KIND``, where the kinds are
    good, logical_anomalies and structural_anomalies, and ``CATEGORY/ground_truth/KIND/NNN``, a folder with a mask for
    each defect of one image; the image's mask is their union.

    Parameters
    ----------
    root : path-like
        Folder of categories, or the folder of a single category.
    categories : str or sequence of str, default=None
        Categories to list, in this order; None: all, sorted.
    split : {"train", "validation", "test", "all"}, default="train"
        "train", "validation": normal images; "test": normal and defective ones; "all": all three.

    Returns
    -------
    ImageDataset
        Category by category. No image is opened. Errors and warnings are those of `load_mvtec`.

    References
    ----------
    Bergmann, Batzner, Fauser, Sattlegger & Steger, "Beyond Dents and Scratches: Logical Constraints in Unsupervised
    Anomaly Detection and Localization", IJCV 130, 2022.
    """
    return _categories.load(_categories.MVTEC_LOCO, root, categories, split)


def load_btad(
    root: str | os.PathLike[str], *, categories: str | Sequence[str] | None = None, split: str = "train"
) -> ImageDataset:
    """List the images of BTAD (beanTech Anomaly Detection) as it is distributed.

    The layout is that of MVTec AD with ``CATEGORY/train/ok``, ``CATEGORY/test/ok``, ``CATEGORY/test/ko`` and
    ``CATEGORY/ground_truth/ko``; `load_mvtec` reads it too.

    Parameters
    ----------
    root : path-like
        Folder of the categories 01, 02 and 03, or the folder of one of them.
    categories : str or sequence of str, default=None
        Categories to list, in this order; None: all, sorted.
    split : {"train", "test", "all"}, default="train"
        "train": the normal training images; "test": normal and defective test images; "all": both.

    Returns
    -------
    ImageDataset
        Category by category. No image is opened. Errors and warnings are those of `load_mvtec`.

    References
    ----------
    Mishra, Verk, Fornasier, Piciarelli & Foresti, "VT-ADL: A Vision Transformer Network for Image Anomaly Detection and
    Localization", ISIE 2021. arXiv:2104.10036.
    """
    return _categories.load(_categories.BTAD, root, categories, split)


def load_mpdd(
    root: str | os.PathLike[str], *, categories: str | Sequence[str] | None = None, split: str = "train"
) -> ImageDataset:
    """List the images of MPDD (Metal Parts Defect Detection) as it is distributed.

    The layout is that of MVTec AD: `load_mvtec` reads it too.

    Parameters
    ----------
    root : path-like
        Folder of categories, or the folder of a single category.
    categories : str or sequence of str, default=None
        Categories to list, in this order; None: all, sorted.
    split : {"train", "test", "all"}, default="train"
        "train": the normal training images; "test": normal and defective test images; "all": both.

    Returns
    -------
    ImageDataset
        Category by category. No image is opened. Errors and warnings are those of `load_mvtec`.

    References
    ----------
    Jezek, Jonak, Burget, Dvorak & Skotak, "Deep Learning-based Defect Detection of Metal Parts: Evaluating Current
    Methods in Complex Conditions", ICUMT 2021.
    """
    return _categories.load(_categories.MPDD, root, categories, split)
