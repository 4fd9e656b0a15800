"""The layout of MVTec AD, which many others share, and those of its successors."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vqad.datasets import _categories
from vqad.datasets._collection import ImageDataset


def load_mvtec(
    root: str | os.PathLike[str], *, categories: str | Sequence[str] | None = None, split: str = "train"
) -> ImageDataset:
    """List the images of a folder in the layout of MVTec AD.

    The layout is ``CATEGORY/train/good``, ``CATEGORY/test/KIND`` and ``CATEGORY/ground_truth/KIND``, where
    the mask of ``NNN.png`` is ``NNN_mask.png``, ``NNN.png`` or ``NNN_GT.png``, with any image suffix, or all images of
    a folder ``NNN``. The names of folders may be in capitals; ``ok`` and ``normal`` are taken for ``good``, and
    ``masks`` for ``ground_truth``.

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
        Of what is left out: images and folders of images that lie beside the categories, or in a category but not in
        the folders above, and files that are no images by their names. Of images of defects without a mask, if others
        have one, and of masks without an image.

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
    ``CATEGORY/test_public/ground_truth/KIND``. What ``test_private`` and ``test_private_mixed`` show is not known: list
    them with `load_folder`.

    Parameters
    ----------
    root : path-like
        Folder of categories, or the folder of a single category.
    categories : str or sequence of str, default=None
        Which categories, in this order; None: all of them, sorted.
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
    good, logical_anomalies and structural_anomalies, and ``CATEGORY/ground_truth/KIND/NNN``, a folder with the masks
    of one image, one for each of its defects: together they are its mask.

    Parameters
    ----------
    root : path-like
        Folder of categories, or the folder of a single category.
    categories : str or sequence of str, default=None
        Which categories, in this order; None: all of them, sorted.
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
        Which categories, in this order; None: all of them, sorted.
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
        Which categories, in this order; None: all of them, sorted.
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
