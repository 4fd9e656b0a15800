"""Image collections that are read when they are used: one file per layout."""

from vqad.datasets._collection import ImageDataset
from vqad.datasets.elpv import ElpvDataset, load_elpv
from vqad.datasets.folder import load_folder
from vqad.datasets.mvtec import load_mvtec
from vqad.datasets.synthetic import make_textured_parts
from vqad.datasets.visa import load_visa

__all__ = [
    "ElpvDataset",
    "ImageDataset",
    "load_elpv",
    "load_folder",
    "load_mvtec",
    "load_visa",
    "make_textured_parts",
]
