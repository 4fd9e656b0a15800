"""Splits, scorers, and scikit-learn's searches and validation over detectors."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn import config_context
from sklearn.base import BaseEstimator, OutlierMixin, TransformerMixin, clone
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    KFold,
    RandomizedSearchCV,
    cross_val_predict,
    cross_val_score,
    cross_validate,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vqad import BackboneFeatures, HVQTransDetector, VQFlowDetector
from vqad.datasets import ImageDataset, make_textured_parts
from vqad.metrics import (
    aupro,
    image_auroc,
    image_average_precision,
    image_f1_max,
    pixel_auroc,
    pixel_average_precision,
    pixel_f1_max,
)
from vqad.model_selection import (
    InlierKFold,
    PixelScorer,
    image_auroc_scorer,
    image_average_precision_scorer,
    image_f1_max_scorer,
)

# A further detector is one more line.
DETECTORS = [
    HVQTransDetector(
        backbone=None, image_size=64, n_codes=16, d_model=32, n_layers=1, n_heads=4, dim_feedforward=32, max_iter=1,
        false_alarm_rate=0.3, random_state=0,
    ),
    VQFlowDetector(
        backbone=None, image_size=64, n_concepts=4, n_patterns=8, d_concept=8, d_position=4, n_blocks=(1, 1, 1),
        hidden=8, max_iter=1, false_alarm_rate=0.3, random_state=0,
    ),
]  # fmt: skip


class Thumbnails(TransformerMixin, BaseEstimator):
    """A backbone that takes no time: the mean colours of the cells of a grid."""

    def __init__(self, cells=8):
        self.cells = cells

    def fit(self, X, y=None):
        return self

    def transform(self, X):
        pool = torch.nn.AdaptiveAvgPool2d(self.cells)
        return np.stack([pool(torch.from_numpy(x).movedim(2, 0)).movedim(0, 2).numpy() for x in X])


class Brightness(OutlierMixin, BaseEstimator):
    """Bright images, and bright pixels, are anomalous."""

    def fit(self, X, y=None):
        self.offset_ = -0.5
        return self

    def decision_function(self, X):
        return self.offset_ - np.mean(np.reshape(X, (len(X), -1)), axis=1)

    def predict(self, X):
        return np.where(self.decision_function(X) < 0, -1, 1)

    def anomaly_map(self, X):
        return np.asarray(X, dtype=np.float32)


@pytest.fixture
def one_thread():
    """As joblib's processes have it: last bits of a training, and what becomes of them, depend on the threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=DETECTORS, ids=lambda detector: type(detector).__name__)
def detector(request):
    return request.param


@pytest.fixture(scope="module")
def parts():
    """40 normal images of two kinds, then 12 with planted defects; 64 x 64 pixels."""
    return make_textured_parts(40, 12, categories=("disc", "weave"), image_size=64, random_state=0)


@pytest.fixture(scope="module")
def rows():
    """60 feature rows of three kinds, the last 12 of them moved off."""
    rng = np.random.default_rng(0)
    table = 8 * rng.standard_normal((3, 12))[np.arange(60) % 3] + rng.standard_normal((60, 12))
    table[48:] += 5 * rng.standard_normal((12, 12))
    return table.astype(np.float32)


@pytest.fixture(scope="module")
def grey():
    """Grey images (12, 8, 8), of which the last 4 have a bright bar in rows 2 and 3, and the masks of the bars."""
    images = np.random.default_rng(0).uniform(0, 0.6, (12, 8, 8))
    masks = np.zeros(images.shape, dtype=bool)
    masks[8:, 2:4] = True
    images[masks] += 0.3
    return images, masks


Y = np.repeat([1, -1], [48, 12])
Y_PARTS = np.repeat([1, -1], [40, 12])
Y_GREY = np.repeat([1, -1], [8, 4])
NAMES = np.array(["a", "b", "c"])[np.arange(60) % 3]


# ---- InlierKFold ---------------------------------------------------------------------------------


@given(
    n_splits=st.integers(2, 6),
    samples=st.lists(st.tuples(st.sampled_from([1, -1]), st.sampled_from("ab")), max_size=40),
    shuffle=st.booleans(),
    by_category=st.booleans(),
)
def test_folds_are_a_partition_trained_on_normal_samples_alone(n_splits, samples, shuffle, by_category):
    samples = [(1, "a")] * n_splits + samples
    y, category = np.array([s[0] for s in samples]), np.array([s[1] for s in samples])
    splitter = InlierKFold(n_splits, shuffle=shuffle, random_state=0 if shuffle else None)
    folds = list(splitter.split(samples, y, category=category if by_category else None))
    assert len(folds) == splitter.get_n_splits() == n_splits
    tests = [test for _, test in folds]
    np.testing.assert_array_equal(np.sort(np.concatenate(tests)), np.arange(len(y)))
    for train, test in folds:
        np.testing.assert_array_equal(train, np.setdiff1d(np.flatnonzero(y == 1), test))
        assert (np.diff(test) > 0).all()
    strata = [y == label for label in (1, -1)]
    if by_category:
        strata += [(y == label) & (category == name) for label in (1, -1) for name in "ab"]
    for stratum in strata:
        share = [np.count_nonzero(stratum[test]) for test in tests]
        assert max(share) - min(share) <= 1


def test_unshuffled_folds_of_normal_samples_are_those_of_kfold():
    y = np.array([1, 1, -1, 1, 1, 1, 1, -1, 1])
    normal = np.flatnonzero(y == 1)
    ours = [test[y[test] == 1] for _, test in InlierKFold(3, shuffle=False).split(y, y)]
    theirs = [normal[test] for _, test in KFold(3).split(normal)]
    for found, expected in zip(ours, theirs):
        np.testing.assert_array_equal(found, expected)


def test_random_state_decides_the_folds():
    def tests(random_state):
        return [test.tolist() for _, test in InlierKFold(4, random_state=random_state).split(Y, Y)]

    assert tests(3) == tests(3)
    assert tests(3) != tests(4)
    assert tests(np.random.RandomState(3)) == tests(3)
    splitter = InlierKFold(4, random_state=np.random.RandomState(3))
    first, second = ([test.tolist() for _, test in splitter.split(Y, Y)] for _ in range(2))
    assert first != second


@pytest.mark.parametrize(
    ("y", "match"),
    [
        (None, "InlierKFold needs y"),
        ([0, 1] * 30, r"y must be \+1 \(normal\) or -1 \(anomaly\); got \[0, 1\]"),
        ([None] * 60, r"got \[None\]"),
        (["good"] * 60, r"got \['good'\]"),
        (-np.ones(60), "folds need as many normal samples .* got 0"),
        (np.repeat([1, -1], [4, 56]), "n_splits=5 .* got 4"),
        (np.ones((60, 1)), r"got shape \(60, 1\)"),
        (np.ones(59), "inconsistent numbers of samples"),
    ],
)
def test_a_y_that_cannot_be_split_is_explained(rows, y, match):
    with pytest.raises(ValueError, match=match):
        next(InlierKFold().split(rows, y))


@pytest.mark.parametrize("missing", [None, np.nan, "NA"])
def test_a_missing_category_is_explained(rows, missing):
    missing = pytest.importorskip("pandas").NA if missing == "NA" else missing
    for category in ([missing, *NAMES[1:]], np.array([missing, *NAMES[1:]], dtype=object)):
        with pytest.raises(ValueError, match=r"category is missing \(.*\) for 1 images"):
            next(InlierKFold(3).split(rows, Y, category=category))


def test_wrong_parameters_of_the_splitter_are_explained(rows):
    for n_splits in (1, 2.0, True, "3"):
        with pytest.raises(ValueError, match="n_splits must be an int of at least 2"):
            InlierKFold(n_splits)
    with pytest.raises(TypeError, match="shuffle must be True or False"):
        InlierKFold(shuffle=1)
    with pytest.raises(ValueError, match="random_state has no effect"):
        InlierKFold(shuffle=False, random_state=0)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        next(InlierKFold().split(rows, Y, category=["a"]))
    assert repr(InlierKFold(3, random_state=1)) == "InlierKFold(n_splits=3, random_state=1, shuffle=True)"


# ---- scorers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scorer", "metric"),
    [
        (image_auroc_scorer, image_auroc),
        (image_average_precision_scorer, image_average_precision),
        (image_f1_max_scorer, image_f1_max),
    ],
)
def test_image_scorers_take_anomalies_as_positive(scorer, metric, grey):
    X, _ = grey
    made = Brightness().fit(X)
    assert scorer(made, X, Y_GREY) == metric(Y_GREY, X.mean(axis=(1, 2)))
    assert pickle.loads(pickle.dumps(scorer))(made, X, Y_GREY) == scorer(made, X, Y_GREY)


def test_scikit_learns_roc_auc_is_the_same(rows):
    made = IsolationForest(random_state=0).fit(rows[:48])
    expected = roc_auc_score(Y, made.decision_function(rows))
    assert image_auroc_scorer(made, rows, Y) == pytest.approx(expected, abs=1e-12)
    theirs = cross_val_score(made, rows, Y, cv=InlierKFold(3, random_state=0), scoring="roc_auc")
    ours = cross_val_score(made, rows, Y, cv=InlierKFold(3, random_state=0), scoring=image_auroc_scorer)
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_many_scorers_at_once(rows):
    scoring = {"auroc": image_auroc_scorer, "ap": image_average_precision_scorer, "f1": image_f1_max_scorer}
    found = cross_validate(IsolationForest(random_state=0), rows, Y, cv=InlierKFold(3, random_state=0), scoring=scoring)
    for name, scorer in scoring.items():
        alone = cross_val_score(
            IsolationForest(random_state=0), rows, Y, cv=InlierKFold(3, random_state=0), scoring=scorer
        )
        np.testing.assert_array_equal(found[f"test_{name}"], alone)


PIXEL_METRICS = {
    "aupro": aupro,
    "pixel_auroc": pixel_auroc,
    "pixel_average_precision": pixel_average_precision,
    "pixel_f1_max": pixel_f1_max,
}


@pytest.mark.parametrize("name", PIXEL_METRICS)
def test_pixel_scorer_is_the_metric_of_the_maps(grey, name):
    X, masks = grey
    made = Brightness().fit(X)
    found = PixelScorer(name)(made, X, Y_GREY, masks=masks)
    assert found == PIXEL_METRICS[name](masks, X.astype(np.float32))
    assert 0.5 < found < 1
    known = [mask if label == -1 else None for mask, label in zip(masks, Y_GREY)]
    assert PixelScorer(name)(made, X, Y_GREY, masks=known) == found
    scaled = make_pipeline(StandardScalerOfImages(), Brightness()).fit(X)
    assert PixelScorer(name)(scaled, X, Y_GREY, masks=masks) == pytest.approx(found, abs=1e-6)


class StandardScalerOfImages(TransformerMixin, BaseEstimator):
    def fit(self, X, y=None):
        self.mean_, self.scale_ = X.mean(), X.std()
        return self

    def transform(self, X):
        return (X - self.mean_) / self.scale_


def test_pixel_scorer_leaves_out_anomalies_of_unknown_masks(grey):
    X, masks = grey
    made = Brightness().fit(X)
    known = [*masks[:10], None, None]
    assert PixelScorer()(made, X, Y_GREY, masks=known) == aupro(masks[:10], X[:10].astype(np.float32))
    unlabelled = [None, *masks[1:]]
    assert PixelScorer()(made, X, masks=unlabelled) == aupro(masks[1:], X[1:].astype(np.float32))


def test_scores_for_want_of_anomalies_are_nan_with_a_warning(grey):
    X, masks = grey
    made = Brightness().fit(X)
    for scorer in (image_auroc_scorer, image_average_precision_scorer, image_f1_max_scorer):
        for label in (1, -1):
            causes = r"use cv=InlierKFold\(\); its training folds have no anomalies, so set return_train_score=False"
            with pytest.warns(UndefinedMetricWarning, match=rf"but y is \{label:+d} throughout: .*{causes}"):
                assert np.isnan(scorer(made, X, np.full(12, label)))
    for some in (masks[:8], [None] * 8):
        with pytest.warns(UndefinedMetricWarning, match="aupro needs a defect, but the masks mark none"):
            assert np.isnan(PixelScorer()(made, X[:8], Y_GREY[:8], masks=some))


def test_fpr_limit_is_that_of_aupro(grey):
    X, masks = grey
    made, maps = Brightness().fit(X), X.astype(np.float32)
    assert PixelScorer(fpr_limit=0.05)(made, X, Y_GREY, masks=masks) == aupro(masks, maps, fpr_limit=0.05)


def test_wrong_use_of_the_pixel_scorer_is_explained(grey, rows):
    X, masks = grey
    made = Brightness().fit(X)
    with pytest.raises(ValueError, match="needs defect masks: pass masks="):
        PixelScorer()(made, X, Y_GREY)
    with pytest.raises(ValueError, match="masks has 5 entries, but X has 12 images"):
        PixelScorer()(made, X, Y_GREY, masks=masks[:5])
    with pytest.raises(ValueError, match=r"metric must be one of 'aupro', .*; got 'auroc'"):
        PixelScorer("auroc")(made, X, Y_GREY, masks=masks)
    with pytest.raises(TypeError, match="IsolationForest has none"):
        PixelScorer()(IsolationForest().fit(rows), rows, Y, masks=rows)


def test_masks_are_routed_to_the_pixel_scorer(grey):
    X, masks = grey
    cv = InlierKFold(2, random_state=0)
    expected = [aupro(masks[test], X[test].astype(np.float32)) for _, test in cv.split(X, Y_GREY)]
    with config_context(enable_metadata_routing=True):
        scorer = PixelScorer().set_score_request(masks=True)
        for given_masks in (masks, list(masks)):
            found = cross_validate(
                Brightness(), X, Y_GREY, cv=cv, scoring={"aupro": scorer, "auroc": image_auroc_scorer},
                params={"masks": given_masks}, error_score="raise",
            )  # fmt: skip
            np.testing.assert_array_equal(found["test_aupro"], expected)
        search = GridSearchCV(Brightness(), {}, cv=cv, scoring=scorer, error_score="raise")
        search.fit(X, Y_GREY, masks=masks)
        assert search.best_score_ == pytest.approx(np.mean(expected))
        assert search.score(X, Y_GREY, masks=masks) == PixelScorer()(search, X, Y_GREY, masks=masks)
    assert PixelScorer()._get_metadata_request().score.requests == {"masks": None}


def test_masks_come_with_a_collection(detector, parts, tmp_path):
    for i, (image, mask) in enumerate(zip(parts.images, parts.masks)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        Image.fromarray(mask).save(tmp_path / f"{i}-mask.png")
    data = ImageDataset(
        [tmp_path / f"{i}.png" for i in range(52)],
        target=parts.target,
        mask_paths=[tmp_path / f"{i}-mask.png" if i >= 40 else None for i in range(52)],
    )
    made, cv = clone(detector).set_params(backbone=Thumbnails()), InlierKFold(2, random_state=0)
    search = GridSearchCV(made, {}, cv=cv, scoring=PixelScorer("pixel_auroc"), error_score="raise").fit(
        data, data.target
    )
    expected = []
    for train, test in cv.split(data, data.target):
        maps = clone(made).fit(parts.images[train]).anomaly_map(parts.images[test])
        expected.append(pixel_auroc(parts.masks[test], maps))
    assert search.best_score_ == pytest.approx(np.mean(expected), abs=1e-12)


# ---- searches ------------------------------------------------------------------------------------


def test_training_sees_normal_samples_alone(rows):
    seen = []

    class Noting(Brightness):
        def fit(self, X, y=None):
            seen.append((len(X), set(np.unique(y))))
            return super().fit(X, y)

    cross_val_score(Noting(), rows, Y, cv=InlierKFold(3), scoring="roc_auc")
    assert seen == [(32, {1})] * 3


def test_grid_search_is_a_loop_over_folds(detector, rows):
    cv, grid = InlierKFold(2, random_state=0), {"learning_rate": [1e-4, 1e-2], "max_iter": [1]}
    search = GridSearchCV(detector, grid, cv=cv, scoring=image_auroc_scorer, error_score="raise").fit(rows, Y)
    for k, rate in enumerate(grid["learning_rate"]):
        for fold, (train, test) in enumerate(cv.split(rows, Y)):
            made = clone(detector).set_params(learning_rate=rate).fit(rows[train])
            expected = image_auroc(Y[test], -made.decision_function(rows[test]))
            assert search.cv_results_[f"split{fold}_test_score"][k] == expected
    assert search.best_score_ > 0.8
    best = clone(detector).set_params(**search.best_params_).fit(rows[:48])
    np.testing.assert_array_equal(search.score_samples(rows), best.score_samples(rows))
    np.testing.assert_array_equal(search.predict(rows), best.predict(rows))


def test_randomized_search(detector, rows):
    search = RandomizedSearchCV(
        detector, {"batch_size": range(4, 32), "learning_rate": [1e-3, 1e-2]}, n_iter=2, random_state=0,
        cv=InlierKFold(2, random_state=0), scoring=image_average_precision_scorer, error_score="raise",
    ).fit(rows, Y)  # fmt: skip
    assert len(search.cv_results_["params"]) == 2
    assert search.best_score_ > 0.5


def test_halving_search_over_passes(detector, rows):
    search = HalvingGridSearchCV(
        detector, {"learning_rate": [1e-4, 1e-2]}, resource="max_iter", min_resources=1, max_resources=2, factor=2,
        cv=InlierKFold(2, random_state=0), scoring=image_auroc_scorer, error_score="raise",
        return_train_score=False,
    ).fit(rows, Y)  # fmt: skip
    assert search.n_resources_ == [1, 2]
    assert search.best_estimator_.max_iter == 2


def test_halving_search_over_samples(detector, rows):
    search = HalvingGridSearchCV(
        clone(detector).set_params(false_alarm_rate=0.5), {"learning_rate": [1e-4, 1e-2]}, min_resources=30, factor=2,
        random_state=0, cv=InlierKFold(2, random_state=0), scoring=image_auroc_scorer, error_score="raise",
        return_train_score=False,
    ).fit(rows, Y)  # fmt: skip
    assert search.n_resources_ == [30, 60]
    assert search.best_estimator_.n_images_ == 48
    with pytest.raises(ValueError, match="consistent folds"):
        search.set_params(cv=InlierKFold(2)).fit(rows, Y)


@pytest.mark.parametrize("method", ["decision_function", "predict"])
def test_cross_val_predict_tests_every_sample_once(detector, rows, method):
    """Of a decision_function scikit-learn wants classes as soon as it is given y."""
    cv = InlierKFold(3, random_state=0)
    if method == "decision_function":
        found = cross_val_predict(detector, rows, cv=list(cv.split(rows, Y)), method=method)
    else:
        found = cross_val_predict(detector, rows, Y, cv=cv, method=method)
    for train, test in cv.split(rows, Y):
        np.testing.assert_array_equal(found[test], getattr(clone(detector).fit(rows[train]), method)(rows[test]))
    assert found[Y == 1].mean() > found[Y == -1].mean()


@pytest.mark.slow
def test_cross_val_predict_in_parallel(detector, rows, one_thread):
    folds = list(InlierKFold(2, random_state=0).split(rows, Y))
    one, two = (cross_val_predict(detector, rows, cv=folds, method="decision_function", n_jobs=n) for n in (1, 2))
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_grid_search_in_parallel(detector, rows, one_thread):
    search = GridSearchCV(
        detector, {"learning_rate": [1e-4, 1e-2]}, cv=InlierKFold(2, random_state=0), scoring=image_auroc_scorer,
        n_jobs=2, error_score="raise",
    ).fit(rows, Y)  # fmt: skip
    alone = clone(search).set_params(n_jobs=1).fit(rows, Y)
    np.testing.assert_allclose(search.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"])


# ---- pipelines -----------------------------------------------------------------------------------


def test_search_over_a_pipeline(detector, rows):
    made = make_pipeline(StandardScaler(), detector)
    cv, name = InlierKFold(2, random_state=0), type(detector).__name__.lower()
    search = GridSearchCV(
        made, {f"{name}__learning_rate": [1e-4, 1e-2], "standardscaler": [StandardScaler(), "passthrough"]}, cv=cv,
        scoring=image_auroc_scorer, error_score="raise",
    ).fit(rows, Y)  # fmt: skip
    assert len(search.cv_results_["params"]) == 4
    for fold, (train, test) in enumerate(cv.split(rows, Y)):
        alone = clone(made).set_params(**search.best_params_).fit(rows[train])
        expected = image_auroc(Y[test], -alone.decision_function(rows[test]))
        assert search.cv_results_[f"split{fold}_test_score"][search.best_index_] == expected


@pytest.mark.slow
def test_pipeline_from_images_through_a_backbone(detector, parts):
    """Images go in at one end; the detector gets feature maps, and sees what it would see of ready-made ones."""
    made = make_pipeline(BackboneFeatures(image_size=64, stages=(2,)), detector)
    made.fit(parts.images, Y_PARTS)
    maps = made[0].transform(parts.images)
    alone = clone(detector).fit(maps, Y_PARTS)
    np.testing.assert_array_equal(made.score_samples(parts.images), alone.score_samples(maps))
    found = cross_val_score(
        made, parts.images, Y_PARTS, cv=InlierKFold(2, random_state=0), scoring=image_auroc_scorer, error_score="raise"
    )
    expected = cross_val_score(
        detector, maps, Y_PARTS, cv=InlierKFold(2, random_state=0), scoring=image_auroc_scorer, error_score="raise"
    )
    np.testing.assert_array_equal(found, expected)


# ---- category ------------------------------------------------------------------------------------


def test_category_is_a_fit_parameter(detector, rows):
    cv = InlierKFold(2, random_state=0)
    search = GridSearchCV(detector, {}, cv=cv, scoring=image_auroc_scorer, error_score="raise")
    search.fit(rows, Y, category=NAMES)
    assert list(search.best_estimator_.categories_) == ["a", "b", "c"]
    expected = [
        image_auroc(Y[test], -clone(detector).fit(rows[train], category=NAMES[train]).decision_function(rows[test]))
        for train, test in cv.split(rows, Y)
    ]
    assert search.best_score_ == pytest.approx(np.mean(expected))


def test_category_is_a_fit_parameter_of_a_pipeline(detector, rows):
    name = f"{type(detector).__name__.lower()}__category"
    made = make_pipeline(StandardScaler(), detector).fit(rows, Y, **{name: NAMES})
    search = GridSearchCV(made, {}, cv=InlierKFold(2), scoring=image_auroc_scorer, error_score="raise")
    search.fit(rows, Y, **{name: NAMES})
    for fitted in (made, search.best_estimator_):
        assert list(fitted[-1].categories_) == ["a", "b", "c"]
    np.testing.assert_array_equal(search.predict(rows), made.predict(rows))


def test_category_is_routed(detector, rows):
    """To the detector, to the folds, or to both; also through a pipeline."""
    with config_context(enable_metadata_routing=True):
        asking = clone(detector).set_fit_request(category=True)
        folds = InlierKFold(2, random_state=0).set_split_request(category=True)
        for made in (asking, make_pipeline(StandardScaler(), asking)):
            search = GridSearchCV(made, {}, cv=folds, scoring=image_auroc_scorer, error_score="raise")
            search.fit(rows, Y, category=NAMES)
            last = search.best_estimator_ if made is asking else search.best_estimator_[-1]
            assert list(last.categories_) == ["a", "b", "c"]
        expected = [
            image_auroc(Y[test], -clone(detector).fit(rows[train], category=NAMES[train]).decision_function(rows[test]))
            for train, test in folds.split(rows, Y, category=NAMES)
        ]
        alone = cross_val_score(
            asking, rows, Y, cv=folds, scoring=image_auroc_scorer, params={"category": NAMES}, error_score="raise"
        )
        np.testing.assert_array_equal(alone, expected)
        unasked = GridSearchCV(detector, {}, cv=folds, scoring=image_auroc_scorer, error_score="raise")
        with pytest.raises(ValueError, match="category"):
            unasked.fit(rows, Y, category=NAMES)


def test_searches_are_quiet_where_nothing_is_wrong(detector, rows):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cross_val_score(detector, rows, Y, cv=InlierKFold(2, random_state=0), scoring=image_auroc_scorer)
