"""What a detector trains: the abstract model, and the terms that it is judged by."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from .quantize import VectorQuantizer

Features = Tensor | Sequence[Tensor]
Batches = Sequence[tuple[Any, Tensor]]
"""Features and the category (N,) of each image, batch by batch; can be gone through again."""


class FeatureShape(NamedTuple):
    """What a backbone gives of each image.

    Attributes
    ----------
    channels : tuple of int
        Of every map.
    grids : tuple of (int, int)
        Rows and columns of every map.
    strides : tuple of int or None
        Pixels per cell of every map; None of maps that did not come from a known backbone.
    has_deep_view : bool
        Whether the last map comes from a smaller view of the image.
    """

    channels: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    strides: tuple[int, ...] | None = None
    has_deep_view: bool = False


class Term(NamedTuple):
    """One quantity of every cell that says how anomalous it is.

    Attributes
    ----------
    name : str
    weight : float
        On the map, on which all terms' weights add up to 1 after scaling.
    peaks : tuple of float
        Shares of the cells whose highest values count in the score of the image, one entry each; 0 is the highest cell.
    is_trained : bool
        Whether it comes from a model that was trained on the images that it learns from: it is then lower on these than
        on others, and held-out images say where it lies.
    """

    name: str
    weight: float
    peaks: tuple[float, ...]
    is_trained: bool = False


class Configured(nn.Module):
    """A module that can be made again: every argument of its constructor is an attribute of the same name."""

    def config(self) -> dict[str, Any]:
        """Arguments that make a module of the same parts and shapes."""
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        return {name: getattr(self, name) for name in names}


class AnomalyModel(Configured, ABC):
    """What every model gives to the floors above, which train it, judge by it and save it.

    ``features`` is what :meth:`arrange` makes of a backbone's maps, each channel scaled; ``category`` (N,) int64 the
    number of each image's category.
    """

    clip_norm: ClassVar[float]
    """Largest norm of the gradient in training."""
    draws_apart: ClassVar[bool] = False
    """Whether all that draws random numbers in a training step does so within `vqad.nn.draws.drawing`.

    Trainings in several threads then take their steps at once; else one at a time."""

    @property
    @abstractmethod
    def n_categories(self) -> int:
        """Number of categories."""

    @property
    def n_added(self) -> int:
        """How many of them have parts that they share with no other because they came after the first fit."""
        return 0

    @abstractmethod
    def loss(self, features: Any, category: Tensor) -> Tensor:
        """Training loss of a batch, a scalar."""

    @abstractmethod
    def fields(self, features: Any, category: Tensor, gaussian: bool) -> dict[str, Tensor]:
        """Of every term vectors (N, d, h, w), which a Gaussian by location measures, or numbers (N, h, w).

        Parameters
        ----------
        features, category
        gaussian : bool
            Whether the terms stand beside the Gaussians of the features, or alone, as published.
        """

    @abstractmethod
    def terms(self, gaussian: bool) -> tuple[list[Term], float | None]:
        """How the fields count; and the share of the highest cells of the map that make the image score.

        The share is None where terms have peaks of their own.
        """

    @abstractmethod
    def codebooks(self) -> dict[str, VectorQuantizer]:
        """The codebooks by name."""

    @abstractmethod
    def codes(self, features: Any, category: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each codebook the code of every cell, (N, h, w) int64, and its Euclidean distance to it, (N, h, w)."""

    @abstractmethod
    def start(self, batches: Batches) -> None:
        """Start what learns from data before the first step, such as codes."""

    def arrange(self, maps: Sequence[Tensor]) -> Any:
        """The backbone's maps (N, C_k, h_k, w_k), scaled, in the form that the model takes; here the only one."""
        return maps[0]

    def settle(self, batches: Batches) -> None:
        """Do what is to be done once after training, with the images that were learned; nothing here."""

    def rest(self) -> None:
        """Drop what a file of the model does not hold, once nothing learns any more."""
        for module in self.modules():
            if isinstance(module, VectorQuantizer):
                module.rest()

    def extend(self, n: int, batches: Batches) -> None:
        """Make room for ``n`` more categories and start them from their images; all others keep every bit."""
        raise NotImplementedError(f"{type(self).__name__} takes no more categories after fit.")

    def parts_of(self, categories: Sequence[int]) -> list[nn.Module]:
        """What serves these categories and no others, and can go on learning for them."""
        return []

    def group_of(self, category: Any) -> Any:
        """Which group of its codebooks' codes an image of a category has, (n,) of int; each category has its own."""
        return category

    def ready(self) -> nn.Module:
        """What gives the same fields for less in a pass over many images; it must not change from then on."""
        return self

    def check_export(self) -> None:
        """Raise ValueError where the model cannot be a graph, which has no branch on what is in an image."""
