"""Features kept on disk, and images read ahead: nothing changes but the time it takes."""

import subprocess
import sys
import threading
import time
import warnings

import joblib
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.model_selection import GridSearchCV, StratifiedKFold

import vqad.features
from vqad import BackboneFeatures, HVQTransDetector
from vqad.cache import FeatureCache
from vqad.datasets import make_textured_parts
from vqad.images import ImageSequence, check_images
from vqad.streaming import read_ahead

PARTS = make_textured_parts(24, 6, categories=("disc", "weave"), image_size=48, random_state=0)
SMALL = HVQTransDetector(
    image_size=64, gaussian=False, n_codes=8, d_model=16, n_layers=1, n_heads=2, dim_feedforward=16, max_iter=1,
    false_alarm_rate=0.3, random_state=0,
)  # fmt: skip


class Thumbnails(TransformerMixin, BaseEstimator):
    """A caller's own backbone: mean colours of cells, times a number. It notes how many images it was asked for."""

    asked = 0

    def __init__(self, factor=1.0):
        self.factor = factor

    def fit(self, X, y=None):
        self.fitted_ = True
        return self

    def transform(self, X):
        Thumbnails.asked += len(X)
        pool = torch.nn.AdaptiveAvgPool2d(4)
        return np.stack([self.factor * pool(torch.from_numpy(x).movedim(2, 0)).movedim(0, 2).numpy() for x in X])


@pytest.fixture
def asked(monkeypatch):
    """Numbers of images that a timm backbone was asked for, call by call."""
    calls = []
    maps = BackboneFeatures._maps
    monkeypatch.setattr(
        BackboneFeatures, "_maps", lambda self, *args: calls.append(len(args[1][0])) or maps(self, *args)
    )
    return calls


def save_all(folder, images, suffix="png"):
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{k}.{suffix}" for k in range(len(images))]
    for path, image in zip(paths, images):
        Image.fromarray(image).save(path)
    return paths


def normal(detector, **parameters):
    return clone(detector).set_params(**parameters).fit(PARTS.images[:24], category=PARTS.category[:24])


# ---- each image once -----------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["timm", "own"])
def test_a_grid_search_extracts_each_image_once(tmp_path, asked, backbone):
    """4 candidates, 2 folds, and the final fit: 17 passes over images without a memory."""
    Thumbnails.asked = 0
    detector = SMALL if backbone == "timm" else clone(SMALL).set_params(backbone=Thumbnails())
    search = GridSearchCV(
        clone(detector).set_params(memory=str(tmp_path)), {"learning_rate": [1e-3, 1e-2], "n_codes": [4, 8]},
        scoring="roc_auc", cv=StratifiedKFold(2), error_score="raise",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*too few for false_alarm_rate")
        search.fit(PARTS.images, PARTS.target)
        assert (len(asked) if backbone == "timm" else Thumbnails.asked) == 30
        search.best_estimator_.score_samples(PARTS.images)
        search.best_estimator_.anomaly_map(PARTS.images)
    assert (len(asked) if backbone == "timm" else Thumbnails.asked) == 30


@pytest.mark.slow
def test_processes_share_a_memory(tmp_path):
    detector = clone(SMALL).set_params(backbone=Thumbnails(), memory=str(tmp_path))
    grid = {"learning_rate": [1e-3, 1e-2]}
    how = {"scoring": "roc_auc", "cv": StratifiedKFold(2), "error_score": "raise", "refit": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shared = GridSearchCV(detector, grid, n_jobs=2, **how).fit(PARTS.images, PARTS.target)
        alone = GridSearchCV(detector.set_params(memory=None), grid, **how).fit(PARTS.images, PARTS.target)
    np.testing.assert_array_equal(shared.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"])


WRITER = """
import sys
import torch
from vqad.cache import FeatureCache
cache = FeatureCache(sys.argv[1], "features")
wrong = 0
for k in range(150):
    expected = torch.full((2, 30, 30), float(k))
    if (found := cache.find(str(k))) is None:
        cache.keep(str(k), [expected])
    else:
        wrong += not torch.equal(found[0], expected)
sys.exit(wrong)
"""


@pytest.mark.slow
def test_processes_that_write_the_same_entries_never_read_a_part_of_one(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)]) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    cache = FeatureCache(tmp_path, "features")
    assert all(torch.equal(cache.find(str(k))[0], torch.full((2, 30, 30), float(k))) for k in range(150))


# ---- the same to the last bit --------------------------------------------------------------------


@pytest.mark.parametrize("form", ["path", "str", "joblib.Memory", "compressed"])
def test_a_memory_changes_no_bit(tmp_path, form):
    memory = {
        "path": tmp_path,
        "str": str(tmp_path),
        "joblib.Memory": joblib.Memory(tmp_path, verbose=0),
        "compressed": joblib.Memory(tmp_path, verbose=0, compress=3),
    }[form]
    detector = clone(SMALL).set_params(gaussian=form == "path", image_size=96 if form == "path" else 64)
    plain, writes = normal(detector), normal(detector, memory=memory)
    reads = normal(detector, memory=memory)
    expected = plain.score_samples(PARTS.images)
    for made in (writes, reads, reads):
        np.testing.assert_array_equal(made.score_samples(PARTS.images), expected)
    np.testing.assert_array_equal(reads.anomaly_map(PARTS.images[:3]), plain.anomaly_map(PARTS.images[:3]))
    assert reads.loss_curve_ == plain.loss_curve_


@pytest.mark.parametrize(
    ("merge", "precision", "deep_size"),
    [(False, "float32", None), (True, "bfloat16", None), (False, "bfloat16", None), (False, "float32", 32)],
)
def test_maps_come_back_as_they_went(tmp_path, merge, precision, deep_size):
    images = check_images(PARTS.images[:3])
    features = BackboneFeatures(image_size=64, merge=merge, precision=precision, deep_size=deep_size).fit()
    fresh = [maps for _, maps in features.iter_maps(images)]
    for _ in range(2):
        kept = [maps for _, maps in features.iter_maps(images, memory=tmp_path)]
        for one, other in zip(fresh, kept):
            assert [m.dtype for m in one] == [m.dtype for m in other]
            assert [m.stride() for m in one] == [m.stride() for m in other]
            assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_chunks_of_several_images_are_put_together_from_old_and_new(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(vqad.features, "chunk_size", lambda device: 4)
    images, features = check_images(PARTS.images[:11]), BackboneFeatures(image_size=64).fit()
    expected = torch.cat([maps[0] for _, maps in features.iter_maps(images)])
    list(features.iter_maps(images, [1, 2, 3, 6], memory=tmp_path))
    asked.clear()
    parts = list(features.iter_maps(images, memory=tmp_path))
    assert [len(indices) for indices, _ in parts] == [4, 4, 3]
    assert asked == [4, 4, 4]
    torch.testing.assert_close(torch.cat([maps[0] for _, maps in parts]), expected, rtol=0, atol=0)
    asked.clear()
    again = torch.cat([maps[0] for _, maps in features.iter_maps(images, memory=tmp_path)])
    assert not asked
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


# ---- out of memory -------------------------------------------------------------------------------


def test_out_of_memory_halves_what_passes_the_backbone_together(monkeypatch):
    maps = BackboneFeatures._maps

    def small_device(self, network, views, dtype):
        if len(views[0]) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return maps(self, network, views, dtype)

    features = BackboneFeatures(image_size=64).fit()
    expected = features.transform(PARTS.images[:7])
    monkeypatch.setattr(vqad.features, "chunk_size", lambda device: 4)
    monkeypatch.setattr(BackboneFeatures, "_maps", small_device)
    with pytest.warns(UserWarning, match="Out of device memory: continuing with 2 images at a time"):
        made = features.transform(PARTS.images[:7])
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-5)


def test_out_of_memory_halves_what_is_judged_together(monkeypatch):
    maps = np.random.default_rng(0).standard_normal((40, 2, 2, 5), dtype=np.float32)
    made = clone(SMALL).set_params(backbone=None, gaussian=True).fit(maps)
    expected, deviations = made.score_samples(maps), type(made.model_).deviations

    def small_device(self, features, category):
        if len(features) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return deviations(self, features, category)

    monkeypatch.setattr(type(made.model_), "deviations", small_device)
    with pytest.warns(UserWarning, match="continuing with . images at a time"):
        np.testing.assert_allclose(made.score_samples(maps), expected, rtol=1e-3, atol=1e-4)


def test_out_of_memory_with_a_single_image_is_raised(monkeypatch):
    def no_device(self, *args):
        raise torch.OutOfMemoryError("out of memory")

    features = BackboneFeatures(image_size=64).fit()
    monkeypatch.setattr(BackboneFeatures, "_maps", no_device)
    with pytest.raises(torch.OutOfMemoryError):
        features.transform(PARTS.images[:2])


# ---- what makes another entry --------------------------------------------------------------------

OTHER = {
    "image_size": {"image_size": 96},
    "stages": {"stages": (1, 3)},
    "gaussian": {"gaussian": True},  # takes a smaller view too
    "precision": {"precision": "bfloat16"},
    "backbone": {"backbone": "resnet18", "weights": "random"},
}


@pytest.mark.parametrize("change", OTHER)
def test_other_features_are_other_entries(tmp_path, asked, change):
    normal(SMALL, memory=tmp_path, precision="float32")
    asked.clear()
    made = normal(SMALL, memory=tmp_path, **{"precision": "float32", **OTHER[change]})
    assert len(asked) == 24
    plain = normal(SMALL, **{"precision": "float32", **OTHER[change]})
    np.testing.assert_array_equal(made.score_samples(PARTS.images), plain.score_samples(PARTS.images))


@pytest.mark.parametrize(
    "change", [{"n_codes": 4}, {"max_iter": 2}, {"random_state": 3}, {"d_model": 8}, {"patch_size": 1}]
)
def test_other_training_has_the_same_entries(tmp_path, asked, change):
    normal(SMALL, memory=tmp_path)
    asked.clear()
    normal(SMALL, memory=tmp_path, **change)
    assert not asked


def test_another_transformer_has_other_entries(tmp_path):
    normal(SMALL, memory=tmp_path, backbone=Thumbnails())
    Thumbnails.asked = 0
    made = normal(SMALL, memory=tmp_path, backbone=Thumbnails(factor=2.0), standardize=False)
    assert Thumbnails.asked == 24
    normal(SMALL, memory=tmp_path, backbone=Thumbnails(factor=2.0))
    assert Thumbnails.asked == 24
    plain = normal(SMALL, backbone=Thumbnails(factor=2.0), standardize=False)
    np.testing.assert_array_equal(made.score_samples(PARTS.images), plain.score_samples(PARTS.images))


def test_a_file_with_other_content_is_another_image(tmp_path, asked):
    paths = save_all(tmp_path / "images", PARTS.images[:24])
    made = clone(SMALL).set_params(memory=tmp_path / "memory").fit(paths)
    before = made.score_samples(paths[:2])
    Image.fromarray(PARTS.images[25]).save(paths[0])
    asked.clear()
    after = made.score_samples(paths[:2])
    assert len(asked) == 1
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_a_moved_file_is_the_same_image(tmp_path, asked):
    paths = save_all(tmp_path / "images", PARTS.images[:24])
    made = clone(SMALL).set_params(memory=tmp_path / "memory").fit(paths)
    before = made.score_samples(paths)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    asked.clear()
    np.testing.assert_array_equal(made.score_samples(sorted((tmp_path / "elsewhere").iterdir())), sorted_like(before))
    assert not asked


def sorted_like(scores):
    return scores[np.argsort([f"{k}.png" for k in range(len(scores))])]


def test_digests_tell_images_apart():
    grey = np.arange(35, dtype=np.uint8).reshape(5, 7)
    sequences = [[grey], [grey.T.copy()], [grey.reshape(1, 35)], [grey.astype(np.uint16)], [Image.fromarray(grey + 1)]]
    digests = {check_images(X).digest(0) for X in sequences}
    assert len(digests) == len(sequences)
    assert check_images(np.stack([grey + 1, grey])).digest(1) == check_images([grey]).digest(0)
    assert check_images([Image.fromarray(grey)]).digest(0) == check_images([torch.from_numpy(grey)]).digest(0)


def test_a_file_and_its_pixels_are_two_entries(tmp_path):
    [path] = save_all(tmp_path / "images", PARTS.images[:1])
    assert check_images([path]).digest(0) != check_images(PARTS.images[:1]).digest(0)


# ---- accidents -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Exception while loading results")
@pytest.mark.parametrize("damage", ["cut short", "one bit"])
def test_a_damaged_entry_is_made_anew(tmp_path, asked, damage):
    made = normal(SMALL, memory=tmp_path)
    expected = made.score_samples(PARTS.images[:24])
    path = next(iter(tmp_path.rglob("output.pkl")))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[:50] if damage == "cut short" else content)
    asked.clear()
    np.testing.assert_array_equal(made.score_samples(PARTS.images[:24]), expected)
    assert len(asked) == 1
    np.testing.assert_array_equal(made.score_samples(PARTS.images[:24]), expected)
    assert len(asked) == 1


def test_an_image_that_cannot_be_read_is_named_and_not_kept(tmp_path):
    paths = save_all(tmp_path / "images", PARTS.images[:6])
    paths[3].write_bytes(paths[3].read_bytes()[:300])
    for n_jobs in (None, 3):
        with pytest.raises(ValueError, match=r"image 3 of X, path .*3\.png', is truncated"):
            clone(SMALL).set_params(memory=tmp_path / "memory", n_jobs=n_jobs).fit(paths)


def test_a_memory_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"memory='.*file' must be a folder, or the path of a new one"):
        clone(SMALL).set_params(memory=tmp_path / "file").fit(PARTS.images)


def test_a_transformer_that_does_not_pickle_is_explained(tmp_path):
    backbone = Thumbnails(factor=1.0).fit(None)
    backbone.hook = lambda x: x
    assert np.isfinite(normal(SMALL, backbone=backbone).offset_)
    with pytest.raises(ValueError, match="memory needs a backbone Thumbnails that can be pickled"):
        normal(SMALL, backbone=backbone, memory=tmp_path)


def test_features_that_came_ready_are_not_kept(tmp_path):
    rows = np.random.default_rng(0).standard_normal((30, 5), dtype=np.float32)
    clone(SMALL).set_params(backbone=None, memory=tmp_path).fit(rows)
    assert not list(tmp_path.rglob("output.pkl"))


# ---- reading ahead -------------------------------------------------------------------------------


@pytest.mark.parametrize("n_jobs", [1, 2, 5, -1])
@pytest.mark.parametrize("memory", [False, True])
def test_n_jobs_changes_no_bit(tmp_path, n_jobs, memory):
    paths = save_all(tmp_path / "images", PARTS.images)
    memory = tmp_path / "memory" if memory else None
    expected = clone(SMALL).fit(paths[:24]).score_samples(paths)
    made = clone(SMALL).set_params(n_jobs=n_jobs, memory=memory).fit(paths[:24])
    np.testing.assert_array_equal(made.score_samples(paths), expected)
    np.testing.assert_array_equal(made.score_samples(paths), expected)


def test_n_jobs_for_a_transformer_too(tmp_path):
    expected = normal(SMALL, backbone=Thumbnails()).score_samples(PARTS.images)
    made = normal(SMALL, backbone=Thumbnails(), n_jobs=2)
    np.testing.assert_array_equal(made.score_samples(PARTS.images), expected)


def test_images_are_read_by_that_many_threads(monkeypatch):
    readers, at_once, counts = set(), set(), []
    pixels = ImageSequence.pixels

    def slow(self, i):
        readers.add(threading.get_ident())
        at_once.add(threading.get_ident())
        counts.append(len(at_once))
        time.sleep(0.02)
        at_once.discard(threading.get_ident())
        return pixels(self, i)

    monkeypatch.setattr(ImageSequence, "pixels", slow)
    normal(SMALL, backbone=Thumbnails(), n_jobs=3)
    assert max(counts) == 3
    assert threading.get_ident() not in readers
    readers.clear()
    normal(SMALL, backbone=Thumbnails())
    assert readers == {threading.get_ident()}


def test_no_more_is_read_ahead_than_was_asked_for():
    started = []
    items = read_ahead(lambda i: started.append(i) or i, iter(range(100)), 2, 5)
    assert next(items) == 0
    time.sleep(0.1)
    assert len(started) <= 6
    assert [*items] == list(range(1, 100))


def test_what_reading_raises_comes_at_its_place_and_ends_the_threads():
    before = threading.active_count()

    def read(i):
        if i == 3:
            raise ValueError("three")
        return i

    items = read_ahead(read, iter(range(10)), 2, 4)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(items)
    assert threading.active_count() == before
    items = read_ahead(lambda i: i, iter(range(10)), 2, 4)
    next(items)
    items.close()
    assert threading.active_count() == before
