"""The abstract model of a detector, and the terms of its maps and scores."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from .quantize import VectorQuantizer

Features = Tensor | Sequence[Tensor]
Batches = Sequence[tuple[Any, Tensor]]
"""Features and the category (N,) of each image, batch by batch; can be iterated repeatedly."""


class FeatureShape(NamedTuple):
    """Shape of the feature maps of an image.

    Attributes
    ----------
    channels : tuple of int
        Channels of each map.
    grids : tuple of (int, int)
        Rows and columns of each map.
    strides : tuple of int or None
        Pixels per cell of each map; None if the maps do not come from a timm backbone.
    has_deep_view : bool
        Whether the last map comes from a smaller view of the image.
    """

    channels: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    strides: tuple[int, ...] | None = None
    has_deep_view: bool = False


class Term(NamedTuple):
    """A measure of how anomalous each cell is.

    Attributes
    ----------
    name : str
    weight : float
        Weight in the map; the weights of all terms are scaled to a sum of 1.
    peaks : tuple of float
        Entries in the score of the image: each is the mean over this share of the highest cells; 0 is the highest cell.
    is_trained : bool
        Whether it comes from a trained model. It is then lower on training images than on others, so that held-out
        images must calibrate it.
    """

    name: str
    weight: float
    peaks: tuple[float, ...]
    is_trained: bool = False


class Configured(nn.Module):
    """A module that can be recreated: each argument of its constructor is an attribute of the same name."""

    def config(self) -> dict[str, Any]:
        """Constructor arguments for a module with the same parts and shapes."""
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        return {name: getattr(self, name) for name in names}


class AnomalyModel(Configured, ABC):
    """Interface of all models for training, scoring and saving.

    ``features`` is the output of :meth:`arrange` for a backbone's maps with scaled channels; ``category`` (N,) int64 is
    the number of each image's category.
    """

    clip_norm: ClassVar[float]
    """Largest norm of the gradient in training."""
    draws_apart: ClassVar[bool] = False
    """Whether everything in a training step that draws random numbers does so within `vqad.nn.draws.drawing`.

    Then trainings in several threads run their steps concurrently; otherwise one at a time."""

    @property
    @abstractmethod
    def n_categories(self) -> int:
        """Number of categories."""

    @property
    def n_added(self) -> int:
        """Number of categories that were added after the first fit and have their own parts."""
        return 0

    @abstractmethod
    def loss(self, features: Any, category: Tensor) -> Tensor:
        """Training loss of a batch, a scalar."""

    @abstractmethod
    def fields(self, features: Any, category: Tensor, gaussian: bool) -> dict[str, Tensor]:
        """For each term, vectors (N, d, h, w), to be measured by a Gaussian by location, or numbers (N, h, w).

        Parameters
        ----------
        features, category
        gaussian : bool
            Whether the terms are combined with Gaussians of the features, or used alone, as published.
        """

    @abstractmethod
    def terms(self, gaussian: bool) -> tuple[list[Term], float | None]:
        """The terms, and the share of the highest cells of the map whose mean is the image score.

        The share is None if terms have their own peaks.
        """

    @abstractmethod
    def codebooks(self) -> dict[str, VectorQuantizer]:
        """The codebooks by name."""

    @abstractmethod
    def codes(self, features: Any, category: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """For each codebook, the code of each cell, (N, h, w) int64, and its Euclidean distance, (N, h, w)."""

    @abstractmethod
    def start(self, batches: Batches) -> None:
        """Initialise from data before the first step, for instance codes."""

    def arrange(self, maps: Sequence[Tensor]) -> Any:
        """Convert the scaled maps (N, C_k, h_k, w_k) of the backbone to the model's input; here the only map."""
        return maps[0]

    def settle(self, batches: Batches) -> None:
        """Finish after training, with the training images; nothing by default."""

    def rest(self) -> None:
        """Drop what a file of the model does not hold, once nothing learns any more."""
        for module in self.modules():
            if isinstance(module, VectorQuantizer):
                module.rest()

    def extend(self, n: int, batches: Batches) -> None:
        """Add ``n`` categories and initialise them from their images; all others keep every bit."""
        raise NotImplementedError(f"{type(self).__name__} does not support adding categories after fit.")

    def parts_of(self, categories: Sequence[int]) -> list[nn.Module]:
        """The parts that belong only to these categories, and can be trained further."""
        return []

    def group_of(self, category: Any) -> Any:
        """Group of codes of each category, (n,) of int; by default each category has its own."""
        return category

    def ready(self) -> nn.Module:
        """A faster equivalent for scoring many images; the model must not change afterwards."""
        return self

    def check_export(self) -> None:
        """Raise ValueError if the model cannot be exported to a graph, which cannot branch on the image."""
