"""The contract that every detector keeps; a further detector is one more line in DETECTORS."""

import copy
import inspect
import io
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn import config_context
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags
from sklearn.utils._param_validation import InvalidParameterError
from sklearn.utils.estimator_checks import (
    check_estimator,
    check_fit_non_negative,
    check_positive_only_tag_during_fit,
    check_valid_tag_types,
)

import vqad.scoring
from vqad import BackboneFeatures, HVQTransDetector, VQFlowDetector, load, save
from vqad.datasets import ImageDataset, make_textured_parts

DETECTORS = [
    HVQTransDetector(
        image_size=64, n_codes=16, d_model=32, n_layers=1, n_heads=4, dim_feedforward=32, max_iter=2,
        false_alarm_rate=0.2, random_state=0,
    ),
    VQFlowDetector(
        image_size=64, n_concepts=8, n_patterns=16, d_concept=8, d_position=4, n_blocks=(1, 1, 1), hidden=8, max_iter=2,
        learning_rate=5e-3, batch_size=8, false_alarm_rate=0.2, random_state=0,
    ),
]  # fmt: skip

CATEGORIES = ("disc", "pill", "weave")


class Thumbnails(TransformerMixin, BaseEstimator):
    """A caller's own backbone, and a cheap one: the mean colours of the cells of a grid."""

    def __init__(self, cells=4):
        self.cells = cells

    def fit(self, X, y=None):
        self.n_seen_ = len(X)
        return self

    def transform(self, X):
        pool = torch.nn.AdaptiveAvgPool2d(self.cells)
        return np.stack([pool(torch.from_numpy(x).movedim(2, 0)).movedim(0, 2).numpy() for x in X])


class Counting:
    """A lazy collection that notes which images were asked for."""

    def __init__(self, images):
        self.images, self.asked = images, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        self.asked.append(i)
        return self.images[i]


@pytest.fixture(scope="module")
def parts():
    """48 normal images of three kinds, then 12 with planted defects; 64 x 64 pixels."""
    return make_textured_parts(48, 12, categories=CATEGORIES, image_size=64, random_state=0)


@pytest.fixture(scope="module")
def images(parts):
    """The normal images."""
    return parts.images[parts.target == 1]


@pytest.fixture(scope="module")
def labels(parts):
    return parts.category[parts.target == 1]


@pytest.fixture(scope="module", params=DETECTORS, ids=lambda detector: type(detector).__name__)
def detector(request):
    return request.param


@pytest.fixture(scope="module")
def fitted(detector, images, labels):
    """Fitted on images, with the packaged backbone; not to be changed."""
    return clone(detector).fit(images, category=labels)


@pytest.fixture(scope="module")
def quick(detector, images, labels):
    """Fitted on images, with a backbone of its own that takes no time; not to be changed."""
    return thumbnails(detector).fit(images, category=labels)


@pytest.fixture(scope="module")
def scores(fitted, parts):
    return fitted.score_samples(parts.images)


@pytest.fixture(scope="module")
def maps(fitted, parts):
    """Features (60, h, w, C) of the images, for detectors that take features."""
    return BackboneFeatures(image_size=64, stages=(2,), grid_scale=1).fit().transform(parts.images)


@pytest.fixture(scope="module")
def rows():
    """60 feature rows of three kinds, the last 12 of them moved off."""
    rng = np.random.default_rng(0)
    table = 8 * rng.standard_normal((3, 12))[np.arange(60) % 3] + rng.standard_normal((60, 12))
    table[48:] += 5 * rng.standard_normal((12, 12))
    return table.astype(np.float32)


@pytest.fixture(scope="module")
def on_rows(detector, rows):
    """Fitted on feature rows; not to be changed."""
    return features_only(detector).fit(rows[:48], category=np.arange(48) % 3)


def features_only(detector, **parameters):
    return clone(detector).set_params(backbone=None, **parameters)


def thumbnails(detector, **parameters):
    return clone(detector).set_params(backbone=Thumbnails(), **parameters)


def copy_of(fitted, **parameters):
    return pickle.loads(pickle.dumps(fitted)).set_params(**parameters)


def save_all(folder, images):
    paths = [folder / f"{k}.png" for k in range(len(images))]
    for path, image in zip(paths, images):
        Image.fromarray(image).save(path)
    return paths


# ---- parameters ----------------------------------------------------------------------------------


def test_constructor_only_stores(detector):
    names = list(inspect.signature(type(detector)).parameters)
    given = {name: object() for name in names}
    made = type(detector)(**given)
    assert vars(made) == given
    kinds = {p.kind for p in inspect.signature(type(detector)).parameters.values()}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}


def test_every_parameter_is_constrained(detector):
    assert set(detector._parameter_constraints) == set(detector.get_params(deep=False))


def test_clone_and_parameters_round_trip(detector):
    nested = clone(detector).set_params(backbone=Thumbnails(3))
    copied = clone(nested)
    assert copied.backbone is not nested.backbone
    assert copied.get_params()["backbone__cells"] == 3
    copied.set_params(backbone__cells=5, max_iter=7)
    assert (copied.backbone.cells, copied.max_iter, nested.backbone.cells) == (5, 7, 3)


def test_fitting_changes_no_parameter(fitted, detector):
    assert fitted.get_params(deep=False) == detector.get_params(deep=False)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("backbone", 3, "None"),
        ("weights", 3, "None"),
        ("image_size", 0, "int"),
        ("image_shape", 64, "tuple"),
        ("max_iter", 0, r"\[1, inf\)"),
        ("batch_size", 1.5, "int"),
        ("learning_rate", 0, r"\(0.0, inf\)"),
        ("weight_decay", -1, r"\[0.0, inf\)"),
        ("early_stopping", "yes", "bool"),
        ("validation_fraction", 1.0, r"\(0.0, 1.0\)"),
        ("n_iter_no_change", 0, r"\[1, inf\)"),
        ("tol", -1, r"\[0.0, inf\)"),
        ("contamination", 0.6, r"\(0.0, 0.5\]"),
        ("contamination", "some", "'auto'"),
        ("false_alarm_rate", 0, r"\(0.0, 1.0\)"),
        ("calibration_fraction", 1, r"\(0.0, 1.0\)"),
        ("threshold", "local", "'category'"),
        ("device", 0, "str"),
        ("precision", "half", "'bfloat16'"),
        ("random_state", "zero", "RandomState"),
        ("verbose", -1, "bool"),
    ],
)
def test_invalid_parameter_is_named_with_what_is_allowed(detector, rows, name, value, allowed):
    match = rf"'{name}' parameter of {type(detector).__name__} must be.*{allowed}.*Got.* {value!r}"
    with pytest.raises(InvalidParameterError, match=match):
        features_only(detector).set_params(**{name: value}).fit(rows)


def test_wrong_image_size_is_explained(detector, images):
    for size in (8, (64, 64, 3), ("a", 64)):
        with pytest.raises(ValueError, match="image_size must be an int or a pair"):
            clone(detector).set_params(image_size=size).fit(images)


@pytest.mark.parametrize(
    "method",
    ["score_samples", "decision_function", "predict", "p_values", "anomaly_map", "predict_category", "explain"],
)
def test_not_fitted(detector, images, method):
    with pytest.raises(NotFittedError, match="not fitted yet"):
        getattr(clone(detector), method)(images)


def test_a_fit_that_fails_changes_nothing(detector, images, labels):
    made, bad = thumbnails(detector), [*images[:5], np.full((64, 64), np.nan)]
    with pytest.raises(ValueError, match="image 5 of X"):
        made.fit(bad)
    with pytest.raises(NotFittedError):
        made.predict(images)
    before = made.fit(images, category=labels).score_samples(images)
    with pytest.raises(ValueError, match="image 5 of X"):
        made.fit(bad)
    np.testing.assert_array_equal(made.score_samples(images), before)


@pytest.mark.parametrize("wrong", ["labels", "no label", "category", "only anomalies", "one image"])
def test_a_fit_that_is_refused_changes_nothing(detector, rows, wrong):
    made = features_only(detector).fit(rows[:48])
    before, other = made.score_samples(rows), rows[:48, :5]
    arguments = {
        "labels": (other, np.ones(7)), "no label": (other, np.ones((48, 2))), "only anomalies": (other, -np.ones(48)),
        "category": (other, None, np.zeros(7)), "one image": (other[:1],),
    }[wrong]  # fmt: skip
    with pytest.raises(ValueError, match=r"y has|y is -1|category|normal image"):
        made.fit(*arguments[:2], **({"category": arguments[2]} if len(arguments) > 2 else {}))
    np.testing.assert_array_equal(made.score_samples(rows), before)
    assert made.n_features_in_ == 12


def test_a_fit_that_is_stopped_after_calibration_is_not_fitted(detector, rows, monkeypatch):
    made = features_only(detector)
    with monkeypatch.context() as patch:
        patch.setattr("vqad.fitting.add_prototypes", interrupt)
        with pytest.raises(KeyboardInterrupt):
            made.fit(rows[:48])
    with pytest.raises(NotFittedError):
        made.predict(rows)


def interrupt(*args):
    raise KeyboardInterrupt


def test_a_fit_forgets_the_form_of_what_it_saw_before(detector, rows, images):
    made = features_only(detector).fit(rows[:48])
    made.fit(np.tile(rows[:48, None, None, :6], (1, 2, 2, 1)))
    assert not hasattr(made, "n_features_in_")
    made.set_params(backbone=Thumbnails()).fit(images)
    assert made.fitted_.map_shape == (1, 4, 4, 3)


# ---- what comes out ------------------------------------------------------------------------------


def test_shapes_and_types(fitted, parts, scores):
    X = parts.images[44:52]
    assert scores.shape == (60,)
    assert scores.dtype == np.float64
    assert fitted.predict(X).shape == fitted.p_values(X).shape == fitted.predict_category(X).shape == (8,)
    found = fitted.anomaly_map(X)
    assert found.shape == (8, 64, 64)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert np.isfinite(scores).all()
    assert isinstance(fitted.offset_, float)
    assert isinstance(fitted.map_threshold_, float)
    assert fitted.n_iter_ == len(fitted.loss_curve_) == 2


def test_decision_is_score_minus_offset_and_its_sign_is_the_label(quick, parts):
    red = np.zeros((64, 64, 3), dtype=np.uint8) + np.array([255, 0, 0], dtype=np.uint8)
    images = [*parts.images[42:54], red]
    decision = quick.decision_function(images)
    np.testing.assert_array_equal(decision, quick.score_samples(images) - quick.offset_)
    np.testing.assert_array_equal(quick.predict(images), np.where(decision < 0, -1, 1))
    assert set(quick.predict(images)) == {-1, 1}


def test_higher_scores_are_more_normal(scores, parts, on_rows, rows):
    assert scores[parts.target == 1].mean() > scores[parts.target == -1].mean()
    made = on_rows.score_samples(rows)
    assert (made[:48, None] > made[48:]).mean() > 0.9


def test_labels_and_p_values_tell_the_same(quick, parts):
    p = quick.p_values(parts.images)
    assert (p > 0).all()
    assert (p <= 1).all()
    np.testing.assert_array_equal(quick.predict(parts.images) == -1, p <= quick.false_alarm_rate)


def test_fit_predict_is_fit_and_predict(detector, on_rows, rows):
    made = features_only(detector).fit_predict(rows[:48], category=np.arange(48) % 3)
    np.testing.assert_array_equal(made, on_rows.predict(rows[:48]))


def test_maps_are_high_where_the_defect_is(fitted, parts):
    defective = parts.target == -1
    found, masks = fitted.anomaly_map(parts.images[defective]), parts.masks[defective]
    gap = [m[mask].mean() - m[~mask].mean() for m, mask in zip(found, masks)]
    assert np.mean(gap) > 0


def test_maps_have_the_images_own_sizes(fitted, images, scores):
    ragged = [images[0], images[1][:40], images[2][:, :50, 0], images[3]]
    found = fitted.anomaly_map(ragged)
    assert isinstance(found, list)
    assert [m.shape for m in found] == [(64, 64), (40, 64), (64, 50), (64, 64)]
    np.testing.assert_array_equal(found[0], fitted.anomaly_map(images[:1])[0])
    np.testing.assert_array_equal(fitted.score_samples(ragged)[[0, 3]], scores[[0, 3]])


def test_categories_of_images_are_inferred(fitted, parts):
    assert list(fitted.categories_) == list(CATEGORIES)
    assert (fitted.predict_category(parts.images) == parts.category).mean() > 0.95


# ---- X in all its forms --------------------------------------------------------------------------

FORMS = {
    "uint16": lambda x, folder: x.astype(np.uint16) * 257,
    "float32": lambda x, folder: x.astype(np.float32) / np.float32(255),
    "float64": lambda x, folder: x / 255,
    "tensor": lambda x, folder: torch.from_numpy(x),
    "list of arrays": lambda x, folder: list(x),
    "tuple of PIL images": lambda x, folder: tuple(Image.fromarray(image) for image in x),
    "list of str": lambda x, folder: [str(path) for path in save_all(folder, x)],
    "list of Path": lambda x, folder: save_all(folder, x),
    "array of paths": lambda x, folder: np.array([str(path) for path in save_all(folder, x)]),
    "Series of paths": lambda x, folder: pd.Series(save_all(folder, x), index=range(7, 7 + len(x))),
    "ImageDataset": lambda x, folder: ImageDataset(save_all(folder, x)),
    "lazy collection": lambda x, folder: Counting(x),
}


@pytest.mark.parametrize("form", FORMS)
def test_form_of_X_does_not_change_scores(fitted, parts, scores, tmp_path, form):
    X = FORMS[form](parts.images[46:50], tmp_path)
    np.testing.assert_array_equal(fitted.score_samples(X), scores[46:50])


def test_flattened_rows_score_as_images(fitted, parts, scores):
    flat = parts.images[46:50].reshape(4, -1)
    made = copy_of(fitted, image_shape=(64, 64, 3))
    np.testing.assert_array_equal(made.score_samples(flat), scores[46:50])
    assert made.anomaly_map(flat).shape == (4, 64, 64)
    with pytest.raises(ValueError, match="100 columns"):
        made.score_samples(flat[:, :100])


def test_fit_takes_paths_and_flattened_rows_too(detector, images, labels, tmp_path):
    expected = thumbnails(detector).fit(images, category=labels).score_samples(images[:5])
    from_paths = thumbnails(detector).fit(ImageDataset(save_all(tmp_path, images)), category=labels)
    np.testing.assert_array_equal(from_paths.score_samples(images[:5]), expected)
    flat = thumbnails(detector, image_shape=(64, 64, 3)).fit(images.reshape(len(images), -1), category=labels)
    assert flat.n_features_in_ == 64 * 64 * 3
    np.testing.assert_array_equal(flat.score_samples(images[:5]), expected)


def test_fit_reads_every_normal_image_at_most_twice_and_no_other(detector, parts):
    X = Counting(parts.images)
    thumbnails(detector).fit(X, parts.target)
    n_read = np.bincount(X.asked, minlength=len(parts.images))
    assert np.isin(n_read[parts.target == 1], (1, 2)).all()  # again for the thumbnails of its prototypes
    assert (n_read[parts.target == -1] == 0).all()


def test_X_is_not_written_to(detector, images, labels):
    for made, X in ((clone(detector), images / 255), (thumbnails(detector), images.copy())):
        before = X.copy()
        X.setflags(write=False)
        made.set_params(max_iter=1, false_alarm_rate=0.3).fit(X[:12], category=labels[:12])
        made.score_samples(X[:2])
        np.testing.assert_array_equal(X, before)


# ---- scores do not depend on ---------------------------------------------------------------------


def test_scores_do_not_depend_on_company_or_order(fitted, parts, scores):
    some = np.random.default_rng(0).permutation(len(parts.images))[:12]
    np.testing.assert_array_equal(fitted.score_samples(parts.images[some]), scores[some])
    for i in some[:4]:
        np.testing.assert_array_equal(fitted.score_samples(parts.images[[i]]), scores[[i]])
    found = fitted.anomaly_map(parts.images[some[:3]])
    np.testing.assert_array_equal(found[1], fitted.anomaly_map(parts.images[[some[1]]])[0])


def test_scores_do_not_depend_on_company_where_many_images_pass_together(detector, rows, maps, parts):
    rng = np.random.default_rng(0)
    for X, label in ((rows, np.arange(48) % 3), (maps, parts.category[:48])):
        made = features_only(detector).fit(X[:48], category=label)
        far = 30 * rng.standard_normal((5, *X.shape[1:]), dtype=np.float32)
        X = np.concatenate([X, far])
        scores, found = made.score_samples(X), made.anomaly_map(X)
        order = np.random.default_rng(0).permutation(len(X))
        np.testing.assert_array_equal(made.score_samples(X[order]), scores[order])
        np.testing.assert_array_equal(made.anomaly_map(X[order]), found[order])
        alone = np.concatenate([made.score_samples(X[[i]]) for i in range(len(X))])
        np.testing.assert_array_equal(alone, scores)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_scores_do_not_depend_on_batch_size(fitted, parts, scores, batch_size):
    made = copy_of(fitted, batch_size=batch_size)
    np.testing.assert_array_equal(made.score_samples(parts.images[:7]), scores[:7])
    np.testing.assert_array_equal(made.anomaly_map(parts.images[:7]), fitted.anomaly_map(parts.images[:7]))


def test_scores_survive_pickle_and_joblib(fitted, parts, scores, tmp_path):
    joblib.dump(fitted, tmp_path / "detector.joblib")
    for made in (copy_of(fitted), joblib.load(tmp_path / "detector.joblib")):
        np.testing.assert_array_equal(made.score_samples(parts.images[:4]), scores[:4])
        np.testing.assert_array_equal(made.p_values(parts.images[:4]), fitted.p_values(parts.images[:4]))
        assert made.map_threshold_ == fitted.map_threshold_


# ---- randomness ----------------------------------------------------------------------------------


def test_two_fits_with_one_random_state_are_identical(fitted, parts, scores, images, labels):
    again = clone(fitted).fit(images, category=labels)
    np.testing.assert_array_equal(again.score_samples(parts.images[44:52]), scores[44:52])
    assert again.offset_ == fitted.offset_
    assert again.loss_curve_ == fitted.loss_curve_


def test_refitting_forgets_the_first_fit(detector, on_rows, rows):
    made = features_only(detector).fit(rows[:30] + 100)
    made.fit(rows[:48], category=np.arange(48) % 3)
    np.testing.assert_array_equal(made.score_samples(rows), on_rows.score_samples(rows))


def test_random_state_matters_and_may_be_an_instance(detector, on_rows, rows):
    def scores_of(random_state):
        made = features_only(detector, random_state=random_state)
        return made.fit(rows[:48], category=np.arange(48) % 3).score_samples(rows)

    assert not np.array_equal(scores_of(1), on_rows.score_samples(rows))
    first, second = (scores_of(np.random.RandomState(5)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(scores_of(None), scores_of(None))


def test_global_random_states_are_left_alone(detector, images):
    np.random.seed(3)  # noqa: NPY002 - the global state is what is tested
    torch.manual_seed(3)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    made = clone(detector).set_params(max_iter=1, false_alarm_rate=0.5).fit(images[:12])
    made.score_samples(images[:2])
    np.testing.assert_array_equal(np.random.get_state()[1], before[0])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])


def test_global_random_states_do_not_matter(detector, on_rows, rows):
    np.random.seed(4)  # noqa: NPY002 - the global state is what is tested
    torch.manual_seed(4)
    made = features_only(detector).fit(rows[:48], category=np.arange(48) % 3)
    np.testing.assert_array_equal(made.score_samples(rows), on_rows.score_samples(rows))


# ---- y -------------------------------------------------------------------------------------------


def test_rows_labelled_minus_one_are_left_out(detector, on_rows, rows):
    y = np.where(np.arange(60) < 48, 1, -1)
    for labels in (y, list(y), y.astype(float), pd.Series(y, index=range(3, 63))):
        made = features_only(detector).fit(rows, labels, category=np.arange(60) % 3)
        np.testing.assert_array_equal(made.score_samples(rows), on_rows.score_samples(rows))


@pytest.mark.parametrize("y", [[0, 1] * 24, ["good"] * 48, [1, 2, -1] * 16])
def test_other_values_of_y_are_ignored_with_a_warning(detector, on_rows, rows, y):
    with pytest.warns(UserWarning, match=r"y has values other than \+1 .* is ignored") as record:
        made = features_only(detector).fit(rows[:48], y, category=np.arange(48) % 3)
    assert record[0].filename == __file__
    np.testing.assert_array_equal(made.score_samples(rows), on_rows.score_samples(rows))


def test_wrong_lengths_are_named(detector, rows):
    with pytest.raises(ValueError, match=r"y has shape \(7,\), but X has 60 images"):
        features_only(detector).fit(rows, np.ones(7))
    with pytest.raises(ValueError, match=r"category has shape \(7,\), but X has 60 images"):
        features_only(detector).fit(rows, category=["a"] * 7)
    with pytest.raises(ValueError, match="y is -1 for every image"):
        features_only(detector).fit(rows, -np.ones(60))


# ---- categories ----------------------------------------------------------------------------------


def test_labels_may_be_str_or_int_and_their_names_do_not_matter(detector, on_rows, rows):
    number = np.arange(48) % 3
    for names in (np.array([5, 17, 90]), np.array(["a", "b", "c"]), np.array(["a", "b", "c"], dtype=object)):
        made = features_only(detector).fit(rows[:48], category=names[number])
        np.testing.assert_array_equal(made.categories_, names)
        np.testing.assert_array_equal(made.score_samples(rows), on_rows.score_samples(rows))
        np.testing.assert_array_equal(made.predict_category(rows[:48]), names[number])


def test_categories_are_sorted_whatever_order_they_come_in(detector, rows):
    names = np.array(["c", "a", "b"])[np.arange(48) % 3]
    made = features_only(detector).fit(rows[:48], category=list(names))
    assert list(made.categories_) == ["a", "b", "c"]
    np.testing.assert_array_equal(made.predict_category(rows[:48]), names)


@pytest.mark.parametrize("missing", [None, np.nan, 1])
def test_every_image_needs_a_label_of_one_type(detector, rows, missing):
    category = ["a"] * 47 + [missing]
    for given in (category, tuple(category), np.array(category, dtype=object), pd.Series(category, dtype=object)):
        with pytest.raises(ValueError, match="category must have a label for each image, all of them str or all int"):
            features_only(detector).fit(rows[:48], category=given)


def test_numbers_of_categories_are_64_bit(detector, rows):
    for number in (2**64 - 1, 2**70):
        with pytest.raises(ValueError, match="outside the range of 64-bit integers"):
            features_only(detector).fit(rows[:48], category=[0] * 47 + [number])


def test_columns_of_a_table_of_pixels_are_known_again(detector, images, labels):
    flat = images.reshape(len(images), -1).astype(np.float32) / 255
    table = pd.DataFrame(flat, columns=[f"p{k}" for k in range(flat.shape[1])])
    made = thumbnails(detector).set_params(image_shape=images.shape[1:], max_iter=1)
    scores = made.fit(table, category=labels).score_samples(table)
    np.testing.assert_array_equal(made.score_samples(images), scores)
    assert made.n_features_in_ == flat.shape[1]
    with pytest.raises(ValueError, match="feature names should match"):
        made.score_samples(table[table.columns[::-1]])
    made.fit(images, category=labels)
    assert not hasattr(made, "n_features_in_")


def test_categories_are_discovered(detector, images, labels):
    made = clone(detector).set_params(max_iter=1).fit(images)
    assert len(made.categories_) == 3
    table = pd.crosstab(made.predict_category(images[:24]), labels[:24]).to_numpy()
    assert np.count_nonzero(table) == 3


def test_one_category_is_enough(detector, maps, parts):
    own = maps[:48][parts.category[:48] == "disc"]
    for category in (None, ["disc"] * len(own)):
        made = features_only(detector, false_alarm_rate=0.3).fit(own, category=category)
        assert len(made.categories_) == 1
        assert set(made.predict_category(own)) == set(made.categories_)


@pytest.mark.parametrize("kind", ["noise", "white", "another product"])
def test_images_far_from_every_category_are_anomalous(fitted, kind):
    rng = np.random.default_rng(0)
    X = {
        "noise": rng.integers(0, 256, (6, 64, 64, 3), dtype=np.uint8),
        "white": np.full((2, 64, 64), 255, np.uint8),
        "another product": make_textured_parts(6, 0, categories=("tile",), image_size=64, random_state=1).images,
    }[kind]
    np.testing.assert_array_equal(fitted.predict(X), -1)
    assert fitted.score_samples(X).max() < fitted.offset_ - 1


@pytest.mark.parametrize("value", [1e15, 1e25, -1e25, np.finfo(np.float32).max])
def test_features_beyond_all_measure_are_anomalous(on_rows, rows, value):
    """Squares of numbers over 1e19 are none in float32."""
    X = rows[:3].copy()
    X[0, 0] = X[1] = value
    scores = on_rows.score_samples(X)
    assert np.isfinite(scores).all()
    assert scores[:2].max() < -1000 < scores[2]
    np.testing.assert_array_equal(on_rows.predict(X), [-1, -1, 1])
    assert np.isfinite(on_rows.anomaly_map(X)).all()
    made = copy.deepcopy(on_rows).set_threshold(np.vstack([rows[:20], X[:2]]), np.repeat([1, -1], [20, 2]))
    np.testing.assert_array_equal(made.predict(X), [-1, -1, 1])


def test_features_in_large_units_are_told_apart_without_standardizing(detector, rows):
    made = features_only(detector, standardize=False).fit(1e7 * rows[:48], category=np.arange(48) % 3)
    assert len(np.unique(made.score_samples(1e7 * rows[:48]))) > 40


@pytest.mark.parametrize("n_kinds", [1, 8])
def test_many_kinds_in_turn_cost_what_few_do(detector, n_kinds, monkeypatch):
    """The model takes one category at a time, and fills up the last chunk of each."""
    rng = np.random.default_rng(0)
    kind = np.arange(1024) % n_kinds
    X = (9 * rng.standard_normal((n_kinds, 12))[kind] + rng.standard_normal((1024, 12))).astype(np.float32)
    made = features_only(detector).fit(X[:80], category=kind[:80])
    seen, judged = [], vqad.scoring.score_and_map

    def counted(scorer, maps, category):
        seen.append(len(category))
        return judged(scorer, maps, category)

    monkeypatch.setattr(vqad.scoring, "score_and_map", counted)
    made.score_samples(X)
    assert 1024 <= sum(seen) <= 1024 + 64 * n_kinds * 2  # of two parts at the most


def test_parameters_that_are_set_after_fit_change_no_score_and_take_effect_at_the_next(fitted, quick, parts, images):
    others = {"gaussian": False, "standardize": False, "image_size": 96, "stages": (1, 2, 3, 4)}
    if isinstance(fitted, HVQTransDetector):
        others["patch_size"] = 1
    made = copy.deepcopy(fitted).set_params(**others)
    np.testing.assert_array_equal(made.score_samples(parts.images[44:52]), fitted.score_samples(parts.images[44:52]))
    np.testing.assert_array_equal(made.anomaly_map(parts.images[50:52]), fitted.anomaly_map(parts.images[50:52]))
    others = {name: others[name] for name in others if name in ("gaussian", "patch_size")}
    again = copy.deepcopy(quick).set_params(**others).fit(images)
    fresh = clone(quick).set_params(**others).fit(images)
    np.testing.assert_array_equal(again.score_samples(parts.images), fresh.score_samples(parts.images))
    assert not np.array_equal(again.score_samples(parts.images), quick.score_samples(parts.images))


# ---- threshold -----------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", ["global", "category"])
@pytest.mark.parametrize("contamination", [0.1, 0.25, 0.5])
def test_contamination_is_the_share_of_training_images_called_anomalous(detector, rows, contamination, threshold):
    made = features_only(detector, contamination=contamination, threshold=threshold)
    label = made.fit(rows, category=np.arange(60) % 3).predict(rows)
    assert abs((label == -1).mean() - contamination) <= 3 / 60


def test_contamination_counts_the_images_of_early_stopping_too(detector, rows):
    made = features_only(detector, contamination=0.25, early_stopping=True, validation_fraction=0.5)
    assert abs((made.fit_predict(rows) == -1).mean() - 0.25) <= 2 / 60


def test_a_higher_false_alarm_rate_calls_more_images_anomalous(detector, rows):
    made = [features_only(detector, false_alarm_rate=rate).fit(rows[:48]) for rate in (0.11, 0.3, 0.6)]
    assert made[0].offset_ < made[1].offset_ < made[2].offset_
    assert made[0].map_threshold_ > made[1].map_threshold_ > made[2].map_threshold_
    np.testing.assert_array_equal(made[0].score_samples(rows), made[2].score_samples(rows))


def test_a_threshold_for_each_category(detector, rows):
    made = features_only(detector, threshold="category", false_alarm_rate=0.3)
    made.fit(rows[:48], category=np.array(["a", "b", "c"])[np.arange(48) % 3])
    assert made.offset_.shape == (3,)
    own = made.offset_[np.searchsorted(made.categories_, made.predict_category(rows))]
    np.testing.assert_array_equal(made.decision_function(rows), made.score_samples(rows) - own)
    np.testing.assert_array_equal(made.predict(rows) == -1, made.p_values(rows) <= 0.3)
    made.fit(rows[:48], category=["a"] * 48)
    assert made.offset_.shape == (1,)


def test_a_threshold_for_each_category_needs_two_images_of_each(detector, rows):
    with pytest.raises(ValueError, match="needs at least 2 images of each category; b has 1"):
        features_only(detector, threshold="category").fit(rows[:20], category=["a"] * 19 + ["b"])


def test_too_few_images_for_the_asked_rate(detector, rows):
    made = features_only(detector, false_alarm_rate=0.01)
    with pytest.warns(UserWarning, match=r"^10 held-out .* false_alarm_rate=0.01. .* 0.0909, is used") as record:
        made.fit(rows[:48], category=np.zeros(48, dtype=int))
    assert record[0].filename == __file__
    made.set_params(threshold="category")
    with pytest.warns(UserWarning, match="images of category . are too few") as record:
        made.fit(rows[:40], category=["a"] * 20 + ["b"] * 20)
    said = [str(warning.message) for warning in record]
    assert ["category a" in said[0], "category b" in said[1]] == [True, True]
    assert all("smallest rate that they support, 0.2," in message for message in said)


# ---- features as X, own backbones ----------------------------------------------------------------


def test_maps_are_taken_as_features(detector, maps, parts):
    made = features_only(detector, max_iter=4).fit(maps[:48], category=parts.category[:48])
    assert made.anomaly_map(maps).shape == maps.shape[:3]
    assert (made.predict_category(maps) == parts.category).mean() > 0.95
    y = parts.target
    score = made.score_samples(maps)
    assert score[y == 1].mean() > score[y == -1].mean()


@pytest.mark.parametrize(
    ("seen", "given", "match"),
    [
        ((12,), (9,), "X has 9 features, but .* is expecting 12 features"),
        ((4, 4, 12), (12,), r"X has rows of features, but fit saw maps of shape \(4, 4, 12\)"),
        ((12,), (4, 4, 12), r"maps of shape \(4, 4, 12\), but fit saw maps of shape \(1, 1, 12\)"),
        ((4, 4, 12), (2, 4, 12), r"maps of shape \(2, 4, 12\), but fit saw maps of shape \(4, 4, 12\)"),
        ((4, 4, 12), (4, 4, 9), r"maps of shape \(4, 4, 9\), but fit saw maps of shape \(4, 4, 12\)"),
    ],
)
def test_features_of_another_shape_are_refused(detector, seen, given, match):
    rng = np.random.default_rng(0)
    made = features_only(detector, max_iter=1).fit(rng.standard_normal((24, *seen)))
    with pytest.raises(ValueError, match=match):
        made.score_samples(rng.standard_normal((3, *given)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_must_be_finite(detector, on_rows, rows, bad):
    spoilt = rows.copy()
    spoilt[3, 2] = bad
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        features_only(detector).fit(spoilt)
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        on_rows.score_samples(spoilt)


def test_features_far_from_zero_are_standardised_all_the_same(detector):
    # With the mean of 1000 squared in float32 nothing of the variance of 1 would be left.
    X = 1000 + np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)
    made = features_only(detector, max_iter=1, calibration_fraction=0.5).fit(X, category=np.zeros(200, int))
    scale = made.scorer_.scaling.scale_0.flatten().numpy()
    np.testing.assert_allclose(scale, X.std(0), rtol=0.25)


def test_features_keep_their_precision(detector, rows):
    """What came as features is not rounded to the type that the network computes in."""
    shifted = (rows + 1000).astype(np.float32)
    made = features_only(detector, max_iter=1, precision="bfloat16").fit(shifted[:48])
    inside = (shifted[:48].min(0) - 1e-3 < made.scorer_.scaling.mean_0.flatten().numpy()).all()
    spread = made.scorer_.scaling.scale_0.flatten().numpy() / shifted[:48].std(0)
    assert inside
    assert (np.abs(spread - 1) < 0.25).all()


@pytest.mark.parametrize("stages", [(2.0, 3.0), (True, 2), (3, 2), ()])
def test_stages_that_are_none_are_refused_before_images_are_read(detector, stages, tmp_path):
    with pytest.raises(ValueError, match="stages must be increasing integers"):
        clone(detector).set_params(stages=stages).fit(Unreadable())


def test_identical_rows_do_no_harm(detector):
    with pytest.warns(UserWarning, match="All 30 held-out calibration images have the same score: they may be copies"):
        made = features_only(detector).fit(np.ones((30, 5)))
    assert np.isfinite(made.score_samples(np.ones((2, 5)))).all()
    np.testing.assert_array_equal(made.predict(np.zeros((2, 5))), -1)


class Unreadable:
    """Two images, or more of them, that are never looked at."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        raise AssertionError("must not be read")


def test_where_none_can_be_held_out_each_row_counts_once(detector, rows):
    with pytest.warns(UserWarning, match="There are too few groups to hold any out"):
        made = features_only(detector, max_iter=1, false_alarm_rate=0.2).fit(rows[:8], groups=[0] * 8)
    assert made.p_values(rows[:1] + 1e6) == [1 / 9]


def test_features_too_large_to_learn_from_are_named(detector, rows):
    large = rows[:48].astype(np.float64)
    large[7, 1] = -1e19
    with pytest.raises(ValueError, match=r"X\[7\] has a feature of size 1e\+19, but fit accepts at most 1e\+15"):
        features_only(detector).fit(large)
    made = features_only(detector, max_iter=1).fit(large, np.where(np.arange(48) == 7, -1, 1))
    assert made.predict(large[7:8]) == [-1]


def test_images_are_not_mistaken_for_features(detector, images):
    with pytest.raises(ValueError, match="these are images, but backbone=None takes features"):
        features_only(detector).fit(images)


def test_a_list_of_feature_maps_is_an_array_of_them(detector):
    maps = np.random.default_rng(0).standard_normal((20, 3, 4, 5)).astype(np.float32)
    made = features_only(detector).fit(maps)
    np.testing.assert_array_equal(made.score_samples(list(maps)), made.score_samples(maps))
    np.testing.assert_array_equal(made.score_samples([torch.from_numpy(m) for m in maps]), made.score_samples(maps))
    with pytest.raises(ValueError, match=r"shapes \(2, 4, 5\) and \(3, 4, 5\): all must have one shape \(h, w, C\)"):
        made.predict([maps[0], maps[1, :2]])


def test_own_transformer_is_fitted_and_used(detector, images, labels):
    made = thumbnails(detector).fit(images, category=labels)
    assert made.features_.n_seen_ == len(images)
    assert not hasattr(made.backbone, "n_seen_")
    assert made.anomaly_map(images[:2]).shape == (2, 64, 64)
    assert (made.predict_category(images) == labels).mean() > 0.95


def test_fitted_transformer_is_used_as_it_is(detector, images):
    given = Thumbnails().fit(images[:3])
    made = clone(detector).set_params(backbone=given, max_iter=1)
    made.backbone = given  # clone made a new one
    assert made.fit(images).features_.n_seen_ == 3


class RowsOnly(Thumbnails):
    def transform(self, X):
        return super().transform(X).reshape(len(X), -1)


class OwnSizes(Thumbnails):
    def transform(self, X):
        return np.stack([x[::8, ::8] for x in X])


def test_own_transformer_must_give_maps_of_one_shape(detector, images):
    made = clone(detector).set_params(max_iter=1)
    with pytest.raises(ValueError, match=r"RowsOnly gave .* shape \(1, 48\) for image 0 of X, but maps"):
        made.set_params(backbone=RowsOnly()).fit(images)
    made.set_params(backbone=OwnSizes())
    with pytest.raises(ValueError, match=r"\(1, 4, 8, 3\) for image 1 of X, but \(1, 8, 8, 3\) for others"):
        made.fit([images[0], images[1][:32], *images[2:]])
    made.fit(images)
    with pytest.raises(ValueError, match=r"\(1, 4, 8, 3\) for image 2 of X, but \(1, 8, 8, 3\) for others"):
        made.score_samples([images[0], images[1], images[2][:32]])


@pytest.mark.parametrize("merge", [True, False])
def test_backbone_features_keep_their_own_settings(detector, images, labels, merge):
    two = isinstance(detector, HVQTransDetector)
    stages, channels = ((1, 2), (24, 40)) if two else ((1, 2, 3, 4), (24, 40, 112, 320))
    backbone = BackboneFeatures(image_size=96, stages=stages, merge=merge)
    made = clone(clone(detector).set_params(backbone=backbone, max_iter=1)).fit(images[:24], category=labels[:24])
    assert made.features_.size_ == (96, 96)
    assert made.features_.channels_ == channels
    assert not hasattr(backbone, "network_")
    assert made.features_.merge == merge
    assert made.anomaly_map(images[:1]).shape == (1, 64, 64)
    assert np.isfinite(made.score_samples(images[:2])).all()


# ---- what belongs to the whole process ---------------------------------------------------------------


def clone_of(fitted, **parameters):
    made = copy.copy(fitted)
    return made.set_params(**parameters)


def test_threads_may_score_with_one_detector(fitted, parts, scores):
    with ThreadPoolExecutor(6) as pool:
        for k, found in enumerate(pool.map(lambda k: fitted.score_samples(parts.images[k % 6 :: 12]), range(12))):
            np.testing.assert_array_equal(found, scores[k % 6 :: 12])


def few(detector, images, labels):
    """Fitted on few images in no time."""
    return thumbnails(detector, max_iter=1, false_alarm_rate=0.5).fit(images[:18], category=labels[:18])


def test_threads_may_fit(detector, images, labels):
    state = torch.get_rng_state()
    alone = few(detector, images, labels).score_samples(images[:8])
    with ThreadPoolExecutor(4) as pool:
        for each in pool.map(lambda _: few(detector, images, labels), range(4)):
            np.testing.assert_array_equal(each.score_samples(images[:8]), alone)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_fit_is_the_same_whatever_another_thread_does(detector, fitted, parts, images, labels, tmp_path):
    """Score, which gives threads one core each, and load, which draws random numbers."""
    save(fitted, tmp_path / "other.safetensors")
    before, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        expected = few(detector, images, labels).score_samples(images)
        for disturb in (lambda: fitted.score_samples(parts.images[:4]), lambda: load(tmp_path / "other.safetensors")):
            with ThreadPoolExecutor(1) as pool:
                disturb()
                made = pool.submit(lambda: few(detector, images, labels))
                while not made.done():
                    disturb()
            np.testing.assert_array_equal(made.result().score_samples(images), expected)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_of_torch_do_not_matter(fitted, detector, parts, images, labels, scores, mode, tmp_path):
    expected = few(detector, images, labels).score_samples(images)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with mode():
            made = few(detector, images, labels)
            np.testing.assert_array_equal(made.score_samples(images), expected)
            np.testing.assert_array_equal(fitted.score_samples(parts.images[:8]), scores[:8])
            save(fitted, tmp_path / "fitted.safetensors")
            np.testing.assert_array_equal(
                load(tmp_path / "fitted.safetensors").score_samples(parts.images[:8]), scores[:8]
            )
            assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(default)


# ---- training ------------------------------------------------------------------------------------


def test_the_plan_of_the_training_is_what_the_parameters_say(detector, rows, monkeypatch):
    off_their_defaults = {
        "max_iter": 7, "batch_size": 5, "learning_rate": 0.01, "weight_decay": 0.2, "schedule": "step", "verbose": 1,
        "category_balance": 0.25, "early_stopping": True, "n_iter_no_change": 3, "tol": 0.5,
    }  # fmt: skip
    defaults = type(detector)().get_params()
    assert all(defaults[name] != value for name, value in off_their_defaults.items())
    plans = []

    def stop(model, source, category, plan, **where):
        plans.append(asdict(plan))
        raise KeyboardInterrupt

    monkeypatch.setattr("vqad.fitting.Trainer", stop)
    with pytest.raises(KeyboardInterrupt):
        features_only(detector, **off_their_defaults).fit(rows[:48])
    (plan,) = plans
    assert plan.pop("clip_norm") == {"HVQTransDetector": 0.1, "VQFlowDetector": 2.0}[type(detector).__name__]
    assert plan == off_their_defaults


def test_how_many_threads_there_are_changes_no_bit_of_a_score(fitted, parts, scores):
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            np.testing.assert_array_equal(fitted.score_samples(parts.images[::3]), scores[::3])
    finally:
        torch.set_num_threads(before)


def test_early_stopping(detector, rows):
    made = features_only(detector, early_stopping=True, max_iter=30, n_iter_no_change=2, tol=1e9).fit(rows[:48])
    assert made.n_iter_ == 3  # the first pass improves on nothing, two more do not by so much
    assert len(made.validation_curve_) == len(made.loss_curve_) == 3


def test_interrupted_training_leaves_a_usable_detector(detector, rows, monkeypatch):
    loss, steps = detector.model_class.loss, []

    def loss_or_interrupt(self, *batch):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return loss(self, *batch)

    monkeypatch.setattr(detector.model_class, "loss", loss_or_interrupt)
    made = features_only(detector, max_iter=50, batch_size=10)
    with pytest.warns(UserWarning, match="interrupted after 1 of 50 passes"):
        made.fit(rows[:48], category=np.arange(48) % 3)
    assert made.n_iter_ == 1
    assert (made.predict(rows[:48]) == 1).mean() > 0.5
    assert np.isfinite(made.score_samples(rows)).all()


def test_verbose_shows_progress_and_quiet_shows_none(detector, rows, capsys):
    features_only(detector, verbose=1).fit(rows[:48])
    assert "training" in capsys.readouterr().err
    features_only(detector).fit(rows[:48])
    assert capsys.readouterr() == ("", "")


def test_fit_is_quiet_where_nothing_is_wrong(detector, images, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        thumbnails(detector).fit(images, category=labels).predict(images[:3])


# ---- accidents -----------------------------------------------------------------------------------


def truncated(folder):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "png")
    path = folder / "cut.png"
    path.write_bytes(buffer.getvalue()[:2000])
    return path


def text(folder):
    path = folder / "notes.png"
    path.write_text("not an image")
    return path


def broken_pixels(value, dtype=np.float32):
    def make(folder):
        image = np.zeros((64, 64, 3), dtype)
        image[3, 4, 1] = value
        return image

    return make


ACCIDENTS = {
    "truncated PNG": (truncated, ValueError, "image 3 of X, path .*cut.png', is truncated"),
    "text file": (text, ValueError, "image 3 of X, path .*notes.png', is truncated or not an image"),
    "missing file": (lambda folder: folder / "gone.png", FileNotFoundError, "image 3 .*gone.png', does not exist"),
    "folder": (lambda folder: folder, IsADirectoryError, "image 3 of X, path .* is a folder.*load_folder"),
    "NaN pixel": (broken_pixels(np.nan), ValueError, "image 3 of X contains NaN"),
    "infinite pixel": (broken_pixels(np.inf), ValueError, "image 3 of X contains NaN or infinite"),
    "0..255 floats": (broken_pixels(200.0), ValueError, r"image 3 of X has float pixels .* 0\.\.1 is expected"),
    "signed pixels": (broken_pixels(3, np.int64), ValueError, "image 3 of X has dtype int64"),
    "5 channels": (lambda folder: np.zeros((64, 64, 5), np.uint8), ValueError, r"image 3 of X .* C = 5 channels"),
    "channels first": (lambda folder: np.zeros((3, 64, 64), np.uint8), ValueError, "image 3 of X .*np.moveaxis"),
    "no pixels": (lambda folder: np.zeros((0, 64), np.uint8), ValueError, "image 3 of X .*no pixels"),
    "None": (lambda folder: None, ValueError, r"image 3 of X is missing \(None\)"),
}


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_a_bad_image_is_named(detector, quick, images, tmp_path, accident):
    make, error, match = ACCIDENTS[accident]
    X = [*images[:3], make(tmp_path), *images[3:6]]
    for call in (thumbnails(detector).fit, quick.score_samples, quick.anomaly_map, quick.predict_category):
        with pytest.raises(error, match=f"(?s){match}"):
            call(X)


@pytest.mark.parametrize(
    ("X", "error", "match"),
    [
        ([], ValueError, "X is empty"),
        (np.zeros((0, 64, 64, 3), np.uint8), ValueError, "X is empty"),
        (np.zeros((4, 64, 64, 5), np.uint8), ValueError, "C = 5 channels, but 1 .* 3 .* or 4"),
        (np.zeros((64, 64, 3), np.uint8), ValueError, r"looks like one image .* X\[None\]"),
        (np.zeros((4, 100)), ValueError, r"set image_shape=.* backbone=None"),
        (np.zeros(12), ValueError, "X has one dimension"),
        ("image.png", ValueError, "X is a single path, 'image.png'"),
        (3, TypeError, "got int"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_a_wrong_X_is_explained(detector, quick, X, error, match):
    for call in (thumbnails(detector).fit, quick.score_samples):
        with pytest.raises(error, match=match):
            call(X)


def test_X_that_is_a_folder(detector, quick, tmp_path):
    for call in (thumbnails(detector).fit, quick.score_samples):
        with pytest.raises(IsADirectoryError, match=r"X is a folder.*load_folder"):
            call(tmp_path)


def test_one_image_is_too_few(detector, images):
    with pytest.raises(ValueError, match=r"At least 2 normal images are needed.*n_samples=1"):
        thumbnails(detector).fit(images[:1])
    with pytest.raises(ValueError, match="At least 2 normal images are needed"):
        thumbnails(detector).fit(images[:3], [1, -1, -1])


@pytest.mark.parametrize("n", [2, 3, 5])
def test_few_images_are_enough_with_a_warning(detector, images, n):
    made = thumbnails(detector)
    with pytest.warns(UserWarning, match="1 held-out calibration images are too few"):
        made.fit(images[:n])
    assert np.isfinite(made.score_samples(images)).all()
    assert made.predict(np.full((1, 64, 64), 255, np.uint8)) == [-1]


def test_a_category_of_one_image(detector, images, labels):
    names = np.where(np.arange(len(labels)) == 0, "rare", labels)
    made = thumbnails(detector)
    with pytest.warns(UserWarning, match="Category 'rare' has a single image"):
        made.fit(images, category=names)
    assert np.isfinite(made.score_samples(images)).all()
    assert "rare" in made.categories_


def test_tiny_images(fitted, detector, images, labels):
    tiny = images[:, ::8, ::8]
    made = clone(detector).set_params(max_iter=1).fit(tiny[:24], category=labels[:24])
    assert made.anomaly_map(tiny[:2]).shape == (2, 8, 8)
    assert (made.predict_category(tiny[:24]) == labels[:24]).mean() > 0.9
    one_pixel = np.full((1, 1, 1, 3), 128, np.uint8)
    assert fitted.anomaly_map(one_pixel).shape == (1, 1, 1)


def test_alpha_is_dropped_with_a_warning(fitted, parts, scores):
    opaque = np.concatenate([parts.images[:2], np.full((2, 64, 64, 1), 255, np.uint8)], axis=3)
    with pytest.warns(UserWarning, match="alpha") as record:
        np.testing.assert_array_equal(fitted.score_samples(opaque), scores[:2])
    assert record[0].filename == __file__, "said by a thread that reads"
    with pytest.warns(UserWarning, match="alpha") as record:
        np.testing.assert_array_equal(clone_of(fitted, n_jobs=2).score_samples(opaque), scores[:2])
    assert record[0].filename == __file__


def test_missing_weights_are_explained(detector, images):
    with pytest.raises(FileNotFoundError, match="Three ways to get them"):
        clone(detector).set_params(backbone="resnet18").fit(images)


@pytest.mark.parametrize(
    ("device", "match"),
    [
        ("gpu", "is not a torch device; use 'auto', 'cpu' or 'cuda'"),
        pytest.param(
            "cuda",
            "torch finds no working CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA"),
        ),
    ],
)
def test_a_device_that_is_not_there(detector, rows, device, match):
    with pytest.raises(ValueError, match=match):
        features_only(detector, device=device).fit(rows)


# ---- among scikit-learn's tools ------------------------------------------------------------------


def test_in_a_pipeline(detector, rows):
    scaled = make_pipeline(StandardScaler(), features_only(detector)).fit(rows[:48])
    by_hand = StandardScaler().fit(rows[:48])
    alone = features_only(detector).fit(by_hand.transform(rows[:48]))
    np.testing.assert_array_equal(scaled.predict(rows), alone.predict(by_hand.transform(rows)))
    np.testing.assert_array_equal(scaled.score_samples(rows), alone.score_samples(by_hand.transform(rows)))


def test_grid_search_over_labelled_rows(detector, rows):
    y = np.where(np.arange(60) < 48, 1, -1)
    search = GridSearchCV(
        features_only(detector), {"max_iter": [1, 2]}, scoring="roc_auc", cv=StratifiedKFold(2), error_score="raise"
    ).fit(rows, y)
    assert 0.5 < search.best_score_ <= 1
    assert search.predict(rows).shape == (60,)


def test_category_is_routed(detector, rows):
    y, names = np.where(np.arange(60) < 48, 1, -1), np.array(["a", "b", "c"])[np.arange(60) % 3]
    with config_context(enable_metadata_routing=True):
        made = features_only(detector).set_fit_request(category=True)
        scaled = make_pipeline(StandardScaler(), made).fit(rows, y, category=names)
        search = GridSearchCV(made, {"max_iter": [1]}, scoring="roc_auc", cv=StratifiedKFold(2), error_score="raise")
        search.fit(rows, y, category=names)
    assert list(scaled[-1].categories_) == list(search.best_estimator_.categories_) == ["a", "b", "c"]


def test_labels_of_a_collection_count_where_y_is_left_out(detector, images, tmp_path):
    collection = ImageDataset(save_all(tmp_path, images[:20]), target=np.where(np.arange(20) < 14, 1, -1))
    made = thumbnails(detector).fit(collection)
    assert made.n_images_ == 14
    assert made.partial_fit(collection).n_images_ == 28
    assert thumbnails(detector).fit(collection, np.ones(20)).n_images_ == 20


def test_paths_are_split_by_grid_search(detector, parts, tmp_path):
    some = np.r_[0:24, 48:60]
    data = ImageDataset(save_all(tmp_path, parts.images[some]), target=parts.target[some])
    search = GridSearchCV(
        thumbnails(detector, max_iter=1), {"backbone__cells": [2, 4]}, scoring="roc_auc", cv=StratifiedKFold(2),
        error_score="raise",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*too few for false_alarm_rate")
        search.fit(data, data.target)
    assert set(search.best_params_) == {"backbone__cells"}
    assert Path(data.paths[0]).exists()


@pytest.mark.parametrize(
    ("form", "accepted"),
    [
        ({"backbone": None}, {"two_d_array"}),
        ({"backbone": None, "image_shape": (2, 2)}, {"two_d_array"}),
        ({}, {"three_d_array", "string", "positive_only"}),
        ({"image_shape": (2, 2)}, {"two_d_array", "three_d_array", "string", "positive_only"}),
    ],
)
def test_tags_say_what_is_accepted(detector, form, accepted):
    tags = get_tags(clone(detector).set_params(**form))
    assert {name for name, value in asdict(tags.input_tags).items() if value} == accepted
    assert (tags.non_deterministic, tags.no_validation, tags.target_tags.required) == (False, False, False)


def test_tags_are_true(detector, images, rows, tmp_path):
    """What each form takes and refuses, as its tags say."""
    images = images[:24]
    flat, paths = images.reshape(len(images), -1), np.array([str(path) for path in save_all(tmp_path, images)])
    of_rows = features_only(detector, max_iter=1)
    of_images = thumbnails(detector, max_iter=1)
    of_flat = thumbnails(detector, max_iter=1, image_shape=(64, 64, 3))
    for made, X in ((of_rows, rows), (of_images, paths), (of_images, images[..., 0]), (of_flat, flat), (of_flat, paths),
                    (of_flat, images[..., 0])):  # fmt: skip
        made.fit(X)
    negative, missing = np.array(images / 255), np.array(images / 255)
    negative[3, 0, 0], missing[3, 0, 0] = -0.5, np.nan
    of_rows.fit(rows - 100)
    for made, X in ((of_rows, images[..., 0] / 255), (of_images, flat / 255)):
        with pytest.raises(ValueError, match=r"dim 3|image_shape"):
            made.fit(X)
    for made, shape in ((of_images, images.shape), (of_flat, flat.shape)):
        with pytest.raises(ValueError, match=r"^Negative values in data: image 3 of X has float pixels"):
            made.fit(negative.reshape(shape))
        with pytest.raises(ValueError, match="NaN"):
            made.fit(missing.reshape(shape))


@pytest.mark.filterwarnings("ignore:y has values other than")
def test_scikit_learns_checks_of_positive_data(detector):
    """They take the tags at their word."""
    check_positive_only_tag_during_fit("of rows", features_only(detector, max_iter=1))
    for check, shape in ((check_positive_only_tag_during_fit, (1, 4)), (check_fit_non_negative, (1, 2))):
        made = thumbnails(detector, image_shape=shape, max_iter=1)
        check("of flattened images", made)
        check_valid_tag_types("of flattened images", made)


@pytest.mark.slow
def test_scikit_learns_own_checks(detector):
    """Every check of scikit-learn for outlier detectors, on feature rows."""
    tiny = {"n_codes": 4, "d_model": 8, "n_heads": 2, "dim_feedforward": 8, "n_concepts": 2, "n_patterns": 4}
    known = detector.get_params()
    made = features_only(detector, max_iter=1, **{name: size for name, size in tiny.items() if name in known})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(made, on_fail=None, on_skip=None)
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"}
    assert len(results) > 30
    assert not failed
