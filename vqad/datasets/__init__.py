"""Image collections that are read when they are used: one file per layout."""

from vqad.datasets._collection import ImageDataset
from vqad.datasets.elpv import ElpvDataset, load_elpv
from vqad.datasets.folder import load_folder
from vqad.datasets.ksdd2 import load_ksdd2
from vqad.datasets.labelled import load_labelled
from vqad.datasets.mvtec import load_btad, load_mpdd, load_mvtec, load_mvtec_ad2, load_mvtec_loco
from vqad.datasets.synthetic import make_textured_parts
from vqad.datasets.visa import load_visa

__all__ = [
    "ElpvDataset",
    "ImageDataset",
    "load_btad",
    "load_elpv",
    "load_folder",
    "load_ksdd2",
    "load_labelled",
    "load_mpdd",
    "load_mvtec",
    "load_mvtec_ad2",
    "load_mvtec_loco",
    "load_visa",
    "make_textured_parts",
]
