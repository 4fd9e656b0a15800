"""vqad.save and vqad.load: what comes back is what was saved, and a file can do nothing but that."""

import builtins
import io
import json
import math
import os
import pickle
import random
import re
import stat
import subprocess
import sys
import zipfile
from dataclasses import is_dataclass
from pathlib import Path

import joblib
import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file, save_file
from sklearn import config_context
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV

import vqad
from vqad import BackboneFeatures, HVQTransDetector, VQFlowDetector
from vqad._codec import DTYPES, KINDS, PARTS, Reader, Writer, classes
from vqad.backbones import load_backbone
from vqad.persistence import FORMAT_VERSION, _checksum

METHODS = ("score_samples", "decision_function", "p_values", "predict_category", "anomaly_map")
DETECTORS = [
    HVQTransDetector(
        n_codes=4, d_model=16, n_layers=1, n_heads=2, dim_feedforward=8, max_iter=2, false_alarm_rate=0.2,
        random_state=0,
    ),
    VQFlowDetector(
        n_concepts=2, n_patterns=4, d_concept=4, d_position=4, n_blocks=(1, 1, 1), hidden=4, max_iter=2,
        false_alarm_rate=0.2, random_state=0,
    ),
]  # fmt: skip


class Thumbnails(TransformerMixin, BaseEstimator):
    """A caller's own backbone: the mean colours of the cells of a grid, less those of the images of fit."""

    def __init__(self, cells=4):
        self.cells = cells

    def fit(self, X, y=None):
        self.mean_ = np.mean([np.asarray(x).mean((0, 1)) for x in X], 0).astype(np.float32)
        return self

    def transform(self, X):
        pool = torch.nn.AdaptiveAvgPool2d(self.cells)
        return np.stack([pool(torch.from_numpy(x).movedim(2, 0)).movedim(0, 2).numpy() for x in X]) - self.mean_


@pytest.fixture(scope="module", params=DETECTORS, ids=lambda detector: type(detector).__name__)
def detector(request):
    return clone(request.param).set_params(backbone=None)


@pytest.fixture(scope="module")
def maps():
    """60 feature maps (4, 6, 10) of two kinds; the last 12 of a third."""
    rng = np.random.RandomState(0)
    pattern = 3 * rng.standard_normal((3, 4, 6, 10))
    kind = np.append(np.arange(48) % 2, np.full(12, 2))
    return (pattern[kind] + rng.standard_normal((60, 4, 6, 10))).astype(np.float32)


@pytest.fixture(scope="module")
def images():
    """24 colour images (32, 32), uint8."""
    rng = np.random.RandomState(0)
    return np.clip(
        rng.randint(60, 200, (8, 8, 3)).repeat(4, 0).repeat(4, 1) + rng.randint(-20, 20, (24, 32, 32, 3)), 0, 255
    ).astype(np.uint8)


@pytest.fixture(scope="module")
def labels():
    return np.array(["bolt", "nut"])[np.arange(48) % 2]


@pytest.fixture(scope="module")
def fitted(detector, maps, labels):
    """On feature maps; not to be changed."""
    return clone(detector).fit(maps[:48], category=labels)


@pytest.fixture(scope="module")
def on_maps(maps, labels):
    """The same for one detector, where which it is makes no difference; not to be changed."""
    return clone(DETECTORS[0]).set_params(backbone=None).fit(maps[:48], category=labels)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def saved(on_maps, path):
    vqad.save(on_maps, path)
    return path


def on_images(images, **parameters):
    """A detector with a timm backbone of a few layers."""
    small = clone(DETECTORS[0]).set_params(stages=(1,), image_size=32, max_iter=1)
    return small.set_params(**parameters).fit(images)


def through_file(fitted, path, **options):
    vqad.save(fitted, path)
    return vqad.load(path, **options)


def assert_same_scores(a, b, X):
    X = X[::5]  # of all kinds
    for method in METHODS:
        np.testing.assert_array_equal(getattr(a, method)(X), getattr(b, method)(X), err_msg=method)


def layout(array):
    """Shape, and steps in memory along the axes that have steps."""
    steps = array.stride() if isinstance(array, torch.Tensor) else array.strides
    return tuple(array.shape), [step for step, n in zip(steps, array.shape) if n > 1 and 0 not in array.shape]


def assert_same(a, b, where="detector"):
    """The same types, values and layout in memory, all the way down."""
    assert type(a) is type(b), where
    if isinstance(a, np.ndarray):
        assert (a.dtype, layout(a)) == (b.dtype, layout(b)), where
        np.testing.assert_array_equal(a, b, err_msg=where)
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.requires_grad, layout(a)) == (b.dtype, b.requires_grad, layout(b)), where
        np.testing.assert_array_equal(a.detach().float().numpy(), b.detach().float().numpy(), err_msg=where)
    elif isinstance(a, torch.nn.Module):
        assert_same(dict(a.state_dict(keep_vars=True)), dict(b.state_dict(keep_vars=True)), where)
        assert not b.training
    elif isinstance(a, np.random.RandomState):
        np.testing.assert_equal(b.get_state(legacy=False), a.get_state(legacy=False))
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for k, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{k}]")
    elif isinstance(a, dict) or type(a) in classes().values():
        x, y = (v if isinstance(v, dict) else vars(v) for v in (a, b))
        assert x.keys() == y.keys(), where
        for key in x:
            assert_same(x[key], y[key], f"{where}.{key}")
    elif isinstance(a, (float, np.floating)) and math.isnan(a):
        assert math.isnan(b), where
    else:
        assert a == b, where


def forge(path, change=lambda detector: None, tensors=lambda tensors: None, **metadata):
    """Rewrite a file as somebody would who knows the format, checksum and all."""
    with safetensors.safe_open(path, framework="pt") as file:
        header = file.metadata()
    content = load_file(path)
    detector = json.loads(header["detector"])
    change(detector["object"])
    tensors(content)
    header.update({"detector": json.dumps(detector), **metadata})
    save_file(content, path, {**header, "checksum": _checksum(header, content)})


def part_of(detector, name=None):
    """What a file holds of what was learned, or of a part of it."""
    learned = detector["state"]["_fitted"]["object"]
    if name is None:
        return learned
    part = learned["state"][name]
    return part["object"] if "object" in part else part["module"]


# ---- what is saved comes back --------------------------------------------------------------------


def test_scores_are_the_same_to_the_last_bit(fitted, maps, path):
    assert_same_scores(through_file(fitted, path), fitted, maps)


@pytest.mark.parametrize(
    "parameters",
    [{}, {"threshold": "category"}, {"contamination": 0.1, "standardize": False}, {"gaussian": False}],
)
def test_scores_are_the_same_whatever_decided(detector, maps, labels, path, parameters):
    made = clone(detector).set_params(**parameters).fit(maps[:48], category=labels)
    assert_same_scores(through_file(made, path), made, maps)


def test_scores_of_rows_and_discovered_categories_are_the_same(detector, maps, path):
    rows = maps[:, 0, 0]
    made = clone(detector).fit(rows)
    loaded = through_file(made, path)
    assert_same_scores(loaded, made, rows)
    assert loaded.n_features_in_ == 10


def test_a_refit_keeps_nothing_of_another_backbone(images, maps, labels, path):
    made = HVQTransDetector(backbone=Thumbnails(), d_model=16, n_codes=8, max_iter=1, false_alarm_rate=0.3).fit(images)
    made.set_params(backbone=None).fit(maps[: len(labels)], category=labels)
    assert made.features_ is None
    assert_same_scores(through_file(made, path), made, maps)


def test_scores_of_images_are_the_same(images, path):
    made = on_images(images)
    loaded = through_file(made, path)
    assert_same_scores(loaded, made, images)
    assert_same(loaded.features_.network_, made.features_.network_)
    assert not any(p.requires_grad for p in loaded.features_.network_.parameters())


def test_every_attribute_comes_back(fitted, path):
    assert_same(fitted, through_file(fitted, path))


def test_integer_categories_and_names_of_features_come_back(detector, maps, path):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(maps[:48, 0, 0], columns=[f"é{k}" for k in range(10)])
    made = clone(detector).fit(table, category=np.arange(48) % 2 + 7)
    loaded = through_file(made, path)
    assert_same(made, loaded)
    assert loaded.feature_names_in_.dtype == object
    assert set(loaded.predict_category(table)) == {7, 8}


def test_parameters_of_all_kinds_come_back(on_maps, path):
    made = pickle.loads(pickle.dumps(on_maps))
    made.set_params(
        device=torch.device("cpu"), weights=Path("some") / "where.pth", stages=[1, 2], image_size=(64, np.int64(96)),
        learning_rate=np.float32(0.1), tol=math.inf, dropout=np.float64(0), random_state=np.random.RandomState(3),
        transport=np.str_("nearest"), early_stopping=np.bool_(True), verbose=True,
    )  # fmt: skip
    made.random_state.standard_normal(3)
    loaded = through_file(made, path)
    assert_same(made.get_params(), loaded.get_params())
    assert loaded.random_state.standard_normal() == made.random_state.standard_normal()


def test_requests_for_metadata_come_back(on_maps, path):
    made = pickle.loads(pickle.dumps(on_maps))
    with config_context(enable_metadata_routing=True):
        made.set_fit_request(category="kind")
        loaded = through_file(made, path)
        assert loaded.get_metadata_routing().fit.requests == {"category": "kind", "groups": None}
        assert through_file(on_maps, path).get_metadata_routing().fit.requests == {"category": None, "groups": None}


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda detector: type(detector).__name__)
def test_to_open_and_score_imports_no_more_than_it_needs(detector, images, path):
    vqad.save(clone(detector).set_params(stages=None, image_size=64, max_iter=1).fit(images), path)
    np.save(path.parent / "image.npy", images[:1])
    code = (
        "import sys, numpy as np, vqad\n"
        f"vqad.load({path.name!r}).predict(np.load('image.npy'))\n"
        "print(*({'timm', 'torchvision', 'sympy', 'torch._dynamo', 'sklearn.metrics'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=path.parent, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_fresh_process_scores_the_same(on_maps, maps, saved):
    folder = saved.parent
    np.save(folder / "maps.npy", maps)
    code = (
        "import numpy as np, vqad\n"
        f"scores = vqad.load({saved.name!r}).score_samples(np.load('maps.npy'))\n"
        "np.save('scores.npy', scores)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=folder)
    np.testing.assert_array_equal(np.load(folder / "scores.npy"), on_maps.score_samples(maps))


def test_a_loaded_detector_pickles_clones_and_saves_again(fitted, maps, path):
    loaded = through_file(fitted, path)
    assert_same_scores(pickle.loads(pickle.dumps(loaded)), fitted, maps)
    assert_same_scores(through_file(loaded, path), fitted, maps)
    assert repr(clone(loaded)) == repr(clone(fitted))


def test_a_loaded_detector_fits_as_the_saved_one_would(fitted, maps, labels, path):
    again = through_file(fitted, path).fit(maps[:48], category=labels)
    assert again.loss_curve_ == fitted.loss_curve_
    assert_same_scores(again, fitted, maps)


def test_a_loaded_detector_learns_on_as_the_saved_one_would(fitted, maps, path):
    loaded, kept = through_file(fitted, path), pickle.loads(pickle.dumps(fitted))
    for each in (loaded, kept):
        each.set_params(contamination=0.1).partial_fit(maps[40:], category=["bolt", "nut"] * 4 + ["cog"] * 12)
    assert_same_scores(loaded, kept, maps)
    assert list(through_file(kept, path).categories_) == ["bolt", "nut", "cog"]
    assert_same_scores(vqad.load(path), kept, maps)


def test_random_states_are_left_as_they_were(fitted, images, path):
    def states():
        return random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002

    before = states()
    through_file(fitted, path)
    on = on_images(images, weights="random")
    assert states() == before
    through_file(on, path)
    assert states() == before


def test_loading_in_inference_mode_makes_a_detector_that_learns(fitted, maps, labels, path):
    with torch.inference_mode():
        loaded = through_file(fitted, path)
    assert not any(p.is_inference() for p in loaded.model_.parameters())
    assert_same_scores(loaded, fitted, maps)
    loaded.partial_fit(maps[:8], category=labels[:8])


def test_torchs_defaults_do_not_change_what_is_loaded(fitted, path):
    vqad.save(fitted, path)
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(fitted, vqad.load(path))
    finally:
        torch.set_default_dtype(torch.float32)


# ---- values --------------------------------------------------------------------------------------


def through_json(value):
    writer = Writer(include_backbone=False)
    text = json.dumps(writer.encode(value, "value"), allow_nan=False)
    return Reader(writer.tensors, None, None).decode(json.loads(text))


NUMBERS = hnp.scalar_dtypes().filter(lambda dtype: dtype.name in DTYPES and dtype.isnative)
ARRAYS = hnp.arrays(NUMBERS, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3))
AXES = st.permutations(range(4))
TEXTS = st.text(st.characters(exclude_categories=(), exclude_characters="\0"), max_size=5)
TENSORS = st.builds(
    lambda shape, axes, dtype: torch.arange(math.prod(shape)).view(shape).permute(axes).to(getattr(torch, dtype)),
    st.lists(st.integers(0, 3), min_size=4, max_size=4),
    AXES,
    st.sampled_from(DTYPES),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | ARRAYS | TENSORS
    | hnp.arrays(st.just(np.dtype("<U5")), hnp.array_shapes(max_side=3), elements=TEXTS)
    | NUMBERS.flatmap(lambda dtype: hnp.from_dtype(dtype).map(dtype.type)),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text("abc", max_size=3) | st.integers(4, 9), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=200)
@given(VALUES)
def test_any_value_comes_back(value):
    assert_same(value, through_json(value))


@given(ARRAYS, st.randoms(use_true_random=False))
def test_arrays_keep_the_order_of_their_axes_in_memory(array, shuffle):
    axes = shuffle.sample(range(array.ndim), array.ndim)
    for value in (array.transpose(axes), torch.arange(float(array.size)).view(array.shape).permute(axes)):
        back = through_json(value)
        assert layout(back) == layout(value)


def test_values_of_other_places_in_memory_come_back():
    shared = torch.arange(12.0)
    with torch.inference_mode():
        inference = torch.ones(2, 3) * 2
    big_endian = np.arange(3, dtype=">f4")
    value = [shared, shared[2:5], shared.view(3, 4).T, shared[:1].expand(4), inference, np.arange(9)[::-2]]
    back = through_json([*value, big_endian])
    for a, b in zip(value, back):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert back[-1].dtype == np.float32
    assert back[-1].tolist() == [0, 1, 2]
    back[0][:] = 0  # nobody shares memory with another
    assert back[1].tolist() == [2, 3, 4]


def test_a_memory_map_comes_back_as_an_array(tmp_path):
    joblib.dump(np.arange(6.0), tmp_path / "array")
    mapped = joblib.load(tmp_path / "array", mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    assert_same(np.arange(6.0), through_json(mapped))


@pytest.mark.parametrize(
    "value",
    [object(), len, {1, 2}, b"bytes", 1j, np.zeros(2, complex), np.array([None]), np.datetime64("2020"), PCA(),
     torch.zeros(2).to_sparse(), np.random.default_rng(0), np.ma.zeros(2), torch.nn.Linear(1, 1), int],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_an_attribute_of_another_kind_is_refused_by_name(on_maps, path, value):
    made = pickle.loads(pickle.dumps(on_maps))
    made.conformal_.extra_ = [0, {"deep": value}] if not isinstance(value, torch.nn.Module) else value
    with pytest.raises(TypeError, match=r"detector\._fitted\.thresholds\.conformal\.extra_.* does not support"):
        vqad.save(made, path)
    assert list(path.parent.iterdir()) == []


# ---- what is refused at saving -------------------------------------------------------------------


def test_only_fitted_detectors_of_vqad_are_saved(on_maps, path):
    class Mine(HVQTransDetector):
        pass

    with pytest.raises(NotFittedError):
        vqad.save(HVQTransDetector(), path)
    others = (Mine(), GridSearchCV(HVQTransDetector(), {}), BackboneFeatures(), on_maps.model_, None)
    for other in others:
        with pytest.raises(TypeError, match=rf"takes a fitted .* got {type(other).__name__}.* search\.best_estimator_"):
            vqad.save(other, path)


@pytest.mark.parametrize(
    ("name", "value"), [("d_model", 32), ("n_heads", 4), ("dropout", 0.5), ("n_layers", 2), ("gaussian", False)]
)
def test_parameters_that_were_changed_after_fit_change_no_score(on_maps, maps, path, name, value):
    made = pickle.loads(pickle.dumps(on_maps)).set_params(**{name: value})
    loaded = through_file(made, path)
    assert loaded.get_params()[name] == value
    assert_same_scores(loaded, on_maps, maps)


def test_a_file_is_replaced_whole_or_not_at_all(on_maps, saved, monkeypatch):
    before = saved.read_bytes()

    def half(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr("vqad.persistence.save_file", half)
    with pytest.raises(OSError, match=rf"{re.escape(str(saved))}.* could not be written: No space left"):
        vqad.save(on_maps, saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_places_that_cannot_be_written_to_are_named(on_maps, tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        vqad.save(on_maps, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*missing"):
        vqad.save(on_maps, tmp_path / "missing" / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="links and devices of POSIX")
def test_a_link_stays_one_and_a_pipe_is_refused(on_maps, saved):
    link, pipe = saved.with_name("link"), saved.with_name("pipe")
    link.symlink_to(saved.name)
    saved.write_bytes(b"")
    vqad.save(on_maps, link)
    assert link.is_symlink()
    vqad.load(saved)
    os.mkfifo(pipe)
    with pytest.raises(OSError, match=r"'.*pipe' is a device or a pipe"):
        vqad.save(on_maps, pipe)
    assert pipe.is_fifo()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_path_that_is_not_utf_8_opens(on_maps, maps, path):
    strange = path.with_name(os.fsdecode(b"m\xff.safetensors"))
    assert_same_scores(on_maps, through_file(on_maps, strange), maps)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_file_may_be_read_by_those_who_may_read_other_new_files(saved):
    (saved.parent / "other").touch()
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE((saved.parent / "other").stat().st_mode)


# ---- backbones -----------------------------------------------------------------------------------


def n_weights(path):
    with safetensors.safe_open(path, framework="pt") as file:
        return sum(name.startswith("_fitted.features.network_.") for name in file.keys())  # noqa: SIM118


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with all weights of the packaged backbone's network, but drawn at random."""
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(0)
        file = tmp_path_factory.mktemp("weights") / "first.safetensors"
        save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), file)
    return file


@pytest.fixture(scope="module")
def of_file(images, weights):
    """A detector whose backbone's weights are in a file; not to be changed."""
    return on_images(images, weights=str(weights))


def test_weights_of_a_named_backbone_are_found_again_not_saved(images, path):
    made = on_images(images)
    vqad.save(made, path)
    assert n_weights(path) == 0
    vqad.save(made, path, include_backbone=True)
    assert n_weights(path) == len(made.features_.network_.state_dict())


def test_included_weights_need_no_others(of_file, images, path, monkeypatch):
    vqad.save(of_file, path, include_backbone=True)

    def nowhere(*args):
        raise FileNotFoundError("no weights here")

    for name in ("_packaged_state_dict", "_read_state_dict"):
        monkeypatch.setattr(f"vqad.backbones.{name}", nowhere)
    assert_same_scores(vqad.load(path), of_file, images)


def test_weights_that_are_gone_are_told_and_may_be_elsewhere(of_file, images, weights, path):
    vqad.save(of_file, path)
    elsewhere = weights.rename(weights.with_name("second.safetensors"))
    try:
        with pytest.raises(
            FileNotFoundError, match=r"model .*model\.safetensors.* needs .*first\.safetensors.* is not a file"
        ):
            vqad.load(path)
        loaded = vqad.load(path, weights=elsewhere)
        assert loaded.weights == of_file.weights
        assert_same_scores(loaded, of_file, images)
    finally:
        elsewhere.rename(weights)


def test_other_weights_than_those_of_fit_are_refused(of_file, weights, path):
    vqad.save(of_file, path)
    other = load_file(weights)
    other["conv_stem.weight"][0, 0, 0, 0] += 1
    save_file(other, path.with_name("other.safetensors"))
    with pytest.raises(ValueError, match=r"model .* the weights found here .* differ from those .*SHA-256"):
        vqad.load(path, weights=path.with_name("other.safetensors"))


def test_random_weights_are_always_saved(images, path):
    made = on_images(images, weights="random")
    loaded = through_file(made, path)
    assert n_weights(path) == len(made.features_.network_.state_dict())
    assert_same_scores(loaded, made, images)


def test_nothing_is_downloaded(images, path, monkeypatch):
    asked = []
    monkeypatch.setattr("vqad._codec.load_backbone", lambda *args: asked.append(args) or load_backbone(*args))
    made = on_images(images)
    vqad.save(made, path)

    def say_hub(detector):
        for state in (detector["state"], part_of(detector, "features")["state"]):
            state["weights"] = "hub"

    forge(path, say_hub)
    with pytest.raises(ValueError, match="lacks the backbone's weights, which were 'hub'"):
        vqad.load(path)
    assert asked == []
    made.set_params(weights="hub").features_.set_params(weights="hub")
    loaded = through_file(made, path)
    assert asked == [("tf_efficientnet_lite0", "random", (1, 4), (32, 32))]
    assert_same_scores(loaded, made, images)


def test_fitted_features_given_as_backbone_stay_one_object(images, path):
    features = BackboneFeatures(stages=(1,), image_size=32).fit()
    made = on_images(images, backbone=features)
    loaded = through_file(made, path)
    assert loaded.backbone is loaded.features_
    assert_same_scores(loaded, made, images)
    unfitted = on_images(images, backbone=clone(features))
    loaded = through_file(unfitted, path)
    assert loaded.backbone is not loaded.features_
    assert not loaded.backbone.__sklearn_is_fitted__()
    assert_same_scores(loaded, unfitted, images)


def test_a_backbone_of_the_callers_own_is_given_to_load(images, path):
    made = on_images(images, backbone=Thumbnails())
    with pytest.warns(UserWarning, match="does not hold the detector's backbone, a Thumbnails"):
        vqad.save(made, path)
    with pytest.raises(ValueError, match=r"model .* a Thumbnails, .* vqad.load\(path, backbone=\.\.\.\)"):
        vqad.load(path)
    with pytest.raises(TypeError, match="fitted with a Thumbnails as backbone; got backbone=PCA"):
        vqad.load(path, backbone=PCA())
    with pytest.raises(ValueError, match="needs its backbone fitted"):
        vqad.load(path, backbone=Thumbnails())
    assert_same_scores(vqad.load(path, backbone=made.features_), made, images)
    with pytest.raises(TypeError, match=r"Leave include_backbone out .* or use joblib\.dump"):
        vqad.save(made, path, include_backbone=True)


def test_a_backbone_that_is_not_needed_is_refused(saved):
    with pytest.raises(TypeError, match="leave backbone= out"):
        vqad.load(saved, backbone=Thumbnails())


# ---- files that are no models --------------------------------------------------------------------


def test_the_header_says_what_wrote_the_file(saved):
    with safetensors.safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "vqad"
    assert metadata["format_version"] == str(FORMAT_VERSION)
    packages = json.loads(metadata["packages"])
    assert packages.keys() == {"vqad", "torch", "timm", "scikit-learn", "numpy"}
    assert packages["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert packages["vqad"] == vqad.__version__


def test_every_flipped_bit_is_noticed(saved):
    content = saved.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.RandomState(0)
    positions = [*range(8), *rng.randint(8, header, 150), *rng.randint(header, len(content), 50), len(content) - 1]
    for k in positions:
        damaged = bytearray(content)
        damaged[k] ^= 1 << rng.randint(8)
        saved.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(str(saved))):
            vqad.load(saved)


def test_every_truncation_is_noticed(saved):
    content = saved.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for length in (0, 1, 7, 8, 9, header - 1, header, header + 1, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"{re.escape(str(saved))}.* is no model .* truncated"):
            vqad.load(saved)
    saved.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="is no model"):
        vqad.load(saved)


def foreign_files():
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "text")
    network = io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, network)
    tensors = safetensors.torch.save({"weight": torch.zeros(3)}, {"format": "pt"})
    return {
        "nothing": b"",
        "text": b"no model at all",
        "zip": archive.getvalue(),
        "pickle": pickle.dumps({"format": "vqad-joblib-1", "detector": None}),
        "torch": network.getvalue(),
        "safetensors": tensors,
        "no metadata": safetensors.torch.save({"weight": torch.zeros(3)}),
    }


@pytest.mark.parametrize("kind", foreign_files())
def test_a_file_that_is_no_model_is_refused(path, kind):
    path.write_bytes(foreign_files()[kind])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}.* is no model that vqad\.save or vqad fit wrote"):
        vqad.load(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'.*nowhere' does not exist: make one with vqad fit or vqad\.save"):
        vqad.load(tmp_path / "nowhere")
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        vqad.load(str(tmp_path))


def test_a_newer_format_says_so(saved):
    packages = json.dumps({"vqad": "9.1", "torch": "9.2"})
    forge(saved, format_version=str(FORMAT_VERSION + 1), packages=packages, detector="{}")
    with pytest.raises(
        ValueError, match=rf"format version {FORMAT_VERSION + 1}, which is newer .*vqad 9\.1.*newer vqad"
    ):
        vqad.load(saved)


def test_a_format_without_a_number_is_damaged(saved):
    forge(saved, format_version="one")
    with pytest.raises(ValueError, match="has no format version"):
        vqad.load(saved)


def load_caged(path):
    """vqad.load, where whatever could run code from a file raises an error that is not expected."""

    def never(*args, **more):
        raise BaseException("must not be reached")

    ways = {
        builtins: ("eval", "exec", "compile"),
        os: ("system", "popen"),
        subprocess: ("Popen",),
        pickle: ("load", "loads", "Unpickler"),
        torch: ("load",),
        joblib: ("load",),
    }
    with pytest.MonkeyPatch.context() as patch:
        for place, names in ways.items():
            for name in names:
                patch.setattr(place, name, never)
        return vqad.load(path)


def test_loading_runs_nothing(on_maps, saved):
    assert_same(on_maps, load_caged(saved))


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "eval",
        "HVQTransDetector.fit",
        "sklearn.decomposition.PCA",
        "Writer",
        "",
        None,
        3,
        [],
    ],
)
def test_a_class_that_is_not_ours_is_refused(saved, name):
    for change in (
        lambda detector: detector.update({"class": name}),
        lambda detector: part_of(detector, "thresholds").update({"class": name}),
        lambda detector: detector["state"].update(backbone={"object": {"class": name, "state": {}}}),
    ):
        content = saved.read_bytes()
        forge(saved, change)
        with pytest.raises(ValueError, match=r"cannot be opened: .*(only classes of vqad|unhashable)"):
            load_caged(saved)
        saved.write_bytes(content)


@pytest.mark.parametrize(
    "state",
    [
        {"__class__": "x"},
        {"__dict__": {"dict": []}},
        {"__reduce__": ["os.system", "ls"]},
        {"score_samples": 3},
        {"judge": None},
        {"offset_": 3},
        {"memory": "some/where"},
        {"a b": 1},
        {"unknown_parameter": 1},
        {"x_": {"eval": "1"}},
        {"x_": {"object": {"class": "TrainingLog", "state": {"n_iter": 3}}}},
        {"x_": {"module": {"state": {}}}},
        {"x_": {"tensor": {"tensor": "nowhere"}}},
        {"x_": {"tensor": {"tensor": "_fitted.scorer.router.means", "axes": [0, 0]}}},
        {"x_": {"number": {"dtype": "object", "value": 3}}},
        {"x_": {"device": "toaster"}},
        {"x_": {"requests": {"__init__": {"a": True}}}},
        {"x_": {"object": {"again": 99}}},
        {"x_": {"float": [], "tuple": []}},
        {"_fitted": None},
        {"_fitted": {"object": {"class": "Thresholds", "state": {}}}},
    ],
    ids=lambda state: str(state)[:40],
)
def test_what_no_detector_would_write_is_refused(saved, state):
    forge(saved, lambda detector: detector["state"].update(state))
    with pytest.raises(ValueError, match=rf"model .{re.escape(str(saved))}. cannot be opened: "):
        load_caged(saved)


@pytest.mark.parametrize(
    "state",
    [
        {"scorer": None},
        {"scorer": {"module": {"state": None, "config": None}}},
        {"scorer": {"module": {"state": {}, "config": {"dict": []}}}},
        {"features": {"module": {"state": {}, "config": {"dict": []}}}},
        {"held_out": 3},
        {"thresholds": {"object": {"class": "HeldOut", "state": {}}}},
        {"score": 3},
        {"categories": None},
        {"map_shape": {"foreign": "eval"}},
    ],
    ids=lambda state: str(state)[:40],
)
def test_what_no_fit_would_learn_is_refused(saved, state):
    forge(saved, lambda detector: part_of(detector)["state"].update(state))
    with pytest.raises(ValueError, match=rf"model .{re.escape(str(saved))}. "):
        load_caged(saved)


def test_other_content_than_a_detector_is_refused(saved):
    for detector in ("[]", "3", "not JSON", '{"object": {"class": "TrainingLog", "state": {}}}', "[" * 100_000):
        content = saved.read_bytes()
        forge(saved, detector=detector)
        with pytest.raises(ValueError, match="cannot be opened"):
            load_caged(saved)
        saved.write_bytes(content)


def test_tensors_that_are_missing_or_of_another_shape_are_told(saved):
    content = saved.read_bytes()
    for part in ("model.input_projection.weight", "terms.measures.features.mean", "router.means", "scaling.mean_0"):
        name = f"_fitted.scorer.{part}"
        forge(saved, tensors=lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(ValueError, match=re.escape(name)):
            vqad.load(saved)
        saved.write_bytes(content)
        forge(saved, tensors=lambda tensors, name=name: tensors.update({name: torch.zeros(2, 2)}))
        with pytest.raises(ValueError, match=re.escape(part)):
            vqad.load(saved)
        saved.write_bytes(content)


@pytest.mark.parametrize("shape", [[-1, 4, 6], [10, 0, 6], [10, 4], [10, 4, "wide"], [11, 4, 6], [10**15, 4, 6], None])
def test_a_scorer_of_another_shape_than_its_tensors_is_refused(saved, shape):
    def change(detector):
        config = dict(part_of(detector, "scorer")["config"]["dict"])
        shapes = dict(config["terms"]["dict"])["shapes"]["dict"]
        ((place, _),) = ((k, name) for k, (name, _) in enumerate(shapes) if name == "features")
        shapes[place][1] = shape if shape is None else {"tuple": shape}

    forge(saved, change)
    with pytest.raises(ValueError, match=rf"model .{re.escape(str(saved))}. cannot be opened: "):
        load_caged(saved)


@pytest.mark.parametrize(
    ("part", "name", "value"), [("model", "n_codes", 5), ("model", "d_model", 32), ("router", "n_components", 10**15)]
)
def test_a_model_of_another_shape_than_its_tensors_is_refused(saved, part, name, value):
    def change(detector):
        arguments = dict(part_of(detector, "scorer")["config"]["dict"])[part]["dict"]
        ((place, _),) = ((k, each) for k, (each, _) in enumerate(arguments) if each == name)
        arguments[place][1] = value

    forge(saved, change)
    with pytest.raises(ValueError, match=rf"model .{re.escape(str(saved))}. cannot be opened: "):
        load_caged(saved)


def test_every_class_of_a_file_is_a_dataclass_or_can_be_made_without_arguments():
    assert all(is_dataclass(cls) or type(cls()) is cls for cls in classes().values())
    assert set(PARTS) <= set(classes().values())
    assert {"object", "array", "tensor"} <= KINDS.keys()
