"""export_onnx: the graph gives what the detector gives, or is not written."""

import copy
import importlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.exceptions import NotFittedError

import vqad
from vqad import HVQTransDetector, VQFlowDetector, export, export_onnx
from vqad.cli import main
from vqad.datasets import make_textured_parts

onnx, onnxruntime = (pytest.importorskip(name) for name in ("onnx", "onnxruntime"))

SMALL = {"image_size": 64, "max_iter": 1, "false_alarm_rate": 0.25, "random_state": 0, "precision": "float32"}
HVQ = {"d_model": 32, "n_layers": 1, "n_codes": 16, **SMALL}
# A graph of the packaged backbone takes most of the time, and is not the point of each test.
OF_FEW_LAYERS = {"backbone": "test_efficientnet", "weights": "random"}
FLOW = {"hidden": 8, "n_patterns": 16, "n_concepts": 4, "n_blocks": (1, 1, 1), **SMALL}
PARTS = make_textured_parts(20, 6, categories=("disc", "weave"), image_size=64, random_state=0)
GOOD, KIND = PARTS.images[PARTS.target == 1], PARTS.category[PARTS.target == 1]


def fitted(kind=HVQTransDetector, **parameters):
    return kind(**{**(HVQ if kind is HVQTransDetector else FLOW), **parameters}).fit(GOOD, category=KIND)


@pytest.fixture(scope="module")
def detector():
    return fitted()


def run(path, image):
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    pixels = image.astype(np.float32) / 255 if image.dtype == np.uint8 else image.astype(np.float32)
    return dict(zip(names, session.run(None, {"image": pixels})))


def some_images():
    """Good, defective, larger, smaller, long, and unlike everything."""
    rng = np.random.default_rng(0)
    larger = np.kron(PARTS.images[0], np.ones((3, 2, 1), np.uint8))
    noise = rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)
    return [PARTS.images[0], PARTS.images[20], PARTS.images[-1], larger, larger[::5, ::3], larger[:40], noise]


def assert_same(path, detector):
    """Scores to 1e-3 of their size, labels, categories, and maps."""
    for image in some_images():
        found = run(path, image)
        score, decision = detector.score_samples([image])[0], detector.decision_function([image])[0]
        assert found["score"] == pytest.approx(score, rel=1e-3, abs=1e-3)
        assert abs(decision) > 0.01, "too near the threshold to tell labels by"
        assert found["label"] == detector.predict([image])[0]
        assert detector.categories_[found["category"]] == detector.predict_category([image])[0]
        expected = detector.anomaly_map([image])[0]
        np.testing.assert_allclose(found["map"], expected, atol=2e-3 * max(1, np.abs(expected).max()))


def assert_nan_is_not_normal(path):
    nothing = run(path, np.full((64, 64, 3), np.nan))
    assert np.isnan(nothing["score"])
    assert nothing["label"] == -1


@pytest.fixture(scope="module")
def written(detector, tmp_path_factory):
    """The one graph of the detector, compared on images of ours; and the random state before and after."""
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    before = torch.random.get_rng_state()
    export_onnx(detector, path, X=PARTS.images[-4:])
    return path, before, torch.random.get_rng_state()


@pytest.fixture
def at_hand(written, monkeypatch):
    """The graph of the detector in place of another; and the detectors that one was asked for."""
    asked = []

    def not_again(graph, detector):
        asked.append(detector)
        return onnx.load(written[0])

    monkeypatch.setattr(export, "_to_onnx", not_again)
    return asked


@pytest.mark.slow
def test_the_graph_gives_what_the_detector_gives(detector, written):
    assert_same(written[0], detector)
    assert_nan_is_not_normal(written[0])


@pytest.mark.slow
def test_a_graph_of_vq_flow(tmp_path):
    """Of a long image, whose smaller view has another shape, and with a threshold from the training images."""
    detector = fitted(VQFlowDetector, contamination=0.3, image_size=(64, 96))
    export_onnx(detector, tmp_path / "model.onnx", X=PARTS.images[-4:])
    assert_same(tmp_path / "model.onnx", detector)
    assert_nan_is_not_normal(tmp_path / "model.onnx")


@pytest.mark.slow
def test_a_category_that_was_added_is_in_the_graph(tmp_path):
    """With a threshold of its own; of a detector that rebuilds three stages cell by cell."""
    detector = HVQTransDetector(**HVQ, transport="nearest", patch_size=1, threshold="category", stages=(1, 2, 3))
    detector.set_params(false_alarm_rate=0.4, **OF_FEW_LAYERS)
    detector.fit(GOOD[KIND == "disc"], category=KIND[KIND == "disc"])
    detector.partial_fit(GOOD[KIND == "weave"], category=KIND[KIND == "weave"])
    export_onnx(detector, tmp_path / "model.onnx")
    assert_same(tmp_path / "model.onnx", detector)
    assert_nan_is_not_normal(tmp_path / "model.onnx")


@pytest.mark.slow
def test_metadata_say_what_numbers_mean_and_nothing_else_changes(detector, written):
    path, state, state_after = written
    assert torch.equal(state_after, state)
    fresh = fitted()
    assert detector.get_params() == fresh.get_params()
    assert [type(m) for m in detector.model_.modules()] == [type(m) for m in fresh.model_.modules()]
    np.testing.assert_array_equal(detector.score_samples(GOOD[:3]), fresh.score_samples(GOOD[:3]))
    session = onnxruntime.InferenceSession(path)
    about = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    assert about["categories"] == ["disc", "weave"]
    assert about["offset"] == detector.offset_
    assert about["map_threshold"] == pytest.approx(detector.map_threshold_)
    assert about["packages"]["vqad"] == vqad.__version__
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]


@pytest.mark.slow
def test_a_detector_in_bfloat16_is_compared_in_float32(detector, at_hand, tmp_path):
    rounded = copy.copy(detector).set_params(precision="bfloat16")
    assert np.abs(rounded.score_samples(GOOD[:4]) - detector.score_samples(GOOD[:4])).max() > 0
    export_onnx(rounded, tmp_path / "model.onnx")
    assert [each.precision for each in at_hand] == ["float32"]
    assert rounded.precision == "bfloat16"
    assert_same(tmp_path / "model.onnx", detector)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["score", "label", "map", "category"])
def test_a_graph_that_gives_something_else_is_not_written(detector, at_hand, tmp_path, what):
    path = tmp_path / "model.onnx"
    path.write_text("the former one")
    other = copy.deepcopy(detector)
    if what == "score":
        other.scorer_.terms.ends[:, 0] += 1
    elif what == "map":
        other.scorer_.terms.mean_error -= 10 * other.scorer_.terms.spread_error
    elif what == "category":
        other.scorer_.router.means = other.scorer_.router.means.flip(0)
    else:
        thresholds = replace(detector.fitted_.thresholds, offset=1e9)
        other._fitted = replace(detector.fitted_, thresholds=thresholds)
    with pytest.raises(
        RuntimeError, match=rf"The graph and the detector disagree for image 0.*: .*{what}.*Nothing was"
    ):
        export_onnx(other, path, X=PARTS.images[:1])
    assert path.read_text() == "the former one"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_torch_cannot_write_is_said_with_the_backbone(detector, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise torch.onnx.OnnxExporterError("no node for this\nand pages of advice")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(RuntimeError, match=r"with backbone='tf_efficientnet_lite0': no node for this$"):
        export_onnx(detector, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_a_graph_is_refused(tmp_path, detector):
    path = tmp_path / "model.onnx"
    with pytest.raises(TypeError, match="needs a fitted HVQTransDetector or VQFlowDetector; got int"):
        export_onnx(3, path)
    with pytest.raises(NotFittedError):
        export_onnx(HVQTransDetector(), path)
    rows = np.random.default_rng(0).random((40, 5), np.float32)
    with pytest.raises(ValueError, match=r"with a timm model as backbone; this detector has backbone=None"):
        export_onnx(HVQTransDetector(**{**HVQ, "backbone": None}).fit(rows), path)
    with pytest.raises(ValueError, match=r"transport='exact' cannot be exported because it solves for a plan"):
        export_onnx(fitted(transport="exact"), path)
    flow = fitted(VQFlowDetector)
    flow.partial_fit(1 - GOOD[:8] / 255.0, category=["negative"] * 8)
    with pytest.raises(ValueError, match="fit all categories together"):
        export_onnx(flow, path)
    assert not path.exists()


def test_what_cannot_be_compared_or_written_is_said_before_the_work(detector, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_to_onnx", None)
    with pytest.raises(FileNotFoundError, match="image 0 of X"):
        export_onnx(detector, tmp_path / "model.onnx", X=[str(tmp_path / "none.png")])
    with pytest.raises(ValueError, match="5 channels"):
        export_onnx(detector, tmp_path / "model.onnx", X=np.zeros((1, 64, 64, 5)))
    with pytest.raises(IsADirectoryError):
        export_onnx(detector, tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        export_onnx(detector, tmp_path / "nowhere" / "model.onnx")


@pytest.mark.slow
def test_images_to_compare_on_may_be_flattened(detector, at_hand, tmp_path):
    rows = (GOOD / 255.0).reshape(len(GOOD), -1)
    flat = copy.copy(detector).set_params(image_shape=(64, 64, 3))
    export_onnx(flat, tmp_path / "model.onnx", X=rows[:2])
    assert run(tmp_path / "model.onnx", GOOD[0])["score"] == pytest.approx(flat.score_samples(rows[:1])[0], abs=1e-3)


def test_missing_packages_are_named(detector, tmp_path, monkeypatch):
    def lacking(name):
        if name == "onnxscript":
            raise ImportError("No module named 'onnxscript'")
        return importlib.__import__(name)

    monkeypatch.setattr(export.importlib, "import_module", lacking)
    with pytest.raises(ImportError, match=r'pip install "vqad\[onnx\]" \(No module named .onnxscript.\)'):
        export_onnx(detector, tmp_path / "model.onnx")


@settings(max_examples=40, deadline=None)
@given(*[st.integers(1, 40)] * 2, *[st.integers(2, 40)] * 2)
def test_resizing_by_matrices_is_resizing(h, w, to_h, to_w):
    # To a width of 1, where no backbone wants images, torch 2.15 repeats the first row.
    maps = torch.rand(3, h, w, generator=torch.Generator().manual_seed(0))
    areas = F.interpolate(maps[None], (to_h, to_w), mode="bilinear", align_corners=False, antialias=True)[0]
    torch.testing.assert_close(export._resampled(maps, (to_h, to_w), export._shrinking), areas, rtol=0, atol=1e-5)
    points = F.interpolate(maps[None], (to_h, to_w), mode="bilinear", align_corners=True)[0]
    like = torch.zeros(to_h, to_w)
    torch.testing.assert_close(export._resampled(maps, like, export._between), points, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_the_command_writes_a_graph(detector, at_hand, tmp_path, capsys):
    model, graph = tmp_path / "model.safetensors", tmp_path / "new" / "model.onnx"
    vqad.save(detector, model)
    assert main(["export", str(model), "-o", str(graph)]) == 0
    assert "on synthetic images it agrees with the model in float32" in capsys.readouterr().out
    assert run(graph, PARTS.images[0])["label"] == detector.predict(PARTS.images[:1])[0]
    assert main(["export", str(model), "-o", str(tmp_path / "new" / ".." / "model.safetensors")]) == 2
    assert "would overwrite an input" in capsys.readouterr().err
    vqad.load(model)


def test_the_command_tells_of_a_failed_comparison_in_one_line(detector, tmp_path, capsys, monkeypatch):
    def failing(*args):
        raise RuntimeError("The graph and the detector disagree.")

    monkeypatch.setattr(export, "_to_onnx", failing)
    vqad.save(detector, tmp_path / "model.safetensors")
    assert main(["export", str(tmp_path / "model.safetensors"), "-o", str(tmp_path / "model.onnx")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_backbone_of_ones_own_is_refused(tmp_path):
    class Own(TransformerMixin, BaseEstimator):
        def fit(self, X=None, y=None):
            self.fitted_ = True
            return self

        def transform(self, X):
            return np.stack([np.asarray(x)[::8, ::8] for x in X])

    detector = HVQTransDetector(**{**HVQ, "backbone": Own()}).fit(GOOD)
    with pytest.raises(ValueError, match=r"with a timm model as backbone; this detector has backbone=Own\(\)"):
        export_onnx(detector, tmp_path / "model.onnx")
