"""explain and prototypes_: the arrays behind a map are those that made it; a prototype is the nearest normal patch."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.exceptions import NotFittedError

import vqad
import vqad.prototypes
from vqad import HVQTransDetector, VQFlowDetector
from vqad.datasets import make_textured_parts
from vqad.explain import Explanation
from vqad.prototypes import Prototypes
from vqad.scoring import FAR_WEIGHT
from vqad.verdicts import resize_map

DETECTORS = [
    HVQTransDetector(
        backbone=None, n_codes=8, d_model=16, n_layers=1, n_heads=2, dim_feedforward=16, max_iter=2, batch_size=8,
        false_alarm_rate=0.2, precision="float32", random_state=0,
    ),
    VQFlowDetector(
        backbone=None, n_concepts=4, n_patterns=8, d_concept=4, d_position=4, n_blocks=(1, 1, 1), hidden=4, max_iter=2,
        batch_size=8, false_alarm_rate=0.2, precision="float32", random_state=0,
    ),
]  # fmt: skip
ARRAYS = ("image", "cell", "distance", "usage", "slot")


class Thumbnails(TransformerMixin, BaseEstimator):
    """A caller's own backbone, and a cheap one: the mean colours of the cells of a grid."""

    def fit(self, X, y=None):
        self.is_fitted_ = True
        return self

    def transform(self, X):
        pool = torch.nn.AdaptiveAvgPool2d(8)
        return np.stack([pool(torch.from_numpy(x).movedim(2, 0)).movedim(0, 2).numpy() for x in X])


class Fragile:
    """A lazy collection whose images can be read as often as it is told."""

    def __init__(self, images, times):
        self.images, self.times, self.asked = images, times, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        self.asked.append(int(i))
        if self.asked.count(int(i)) > self.times:
            raise KeyError(f"image {i} is gone")
        return self.images[i]


def make_maps(n, seed=0):
    """Feature maps (n, 8, 8, 6) of two kinds in turn, and of a third and fourth from n = 60 on."""
    pattern = 4 * np.random.default_rng(99).standard_normal((3, 8, 8, 6))
    kind = np.where(np.arange(n) < 60, np.arange(n) % 2, 2)
    return (pattern[kind] + np.random.default_rng(seed).standard_normal((n, 8, 8, 6))).astype(np.float32)


MAPS = make_maps(84)
KNOWN, KIND = MAPS[:60], np.array(["a", "b"])[np.arange(60) % 2]


@pytest.fixture(scope="module", params=DETECTORS, ids=lambda detector: type(detector).__name__)
def detector(request):
    return request.param


@pytest.fixture(scope="module")
def fitted(detector):
    """On feature maps; not to be changed."""
    return clone(detector).fit(KNOWN, category=KIND)


@pytest.fixture(scope="module")
def explained(fitted):
    return fitted.explain(MAPS)


@pytest.fixture(scope="module")
def parts():
    return make_textured_parts(20, 4, categories=("disc", "weave"), image_size=64, random_state=0)


@pytest.fixture(scope="module")
def on_images(detector, parts):
    """On images, with a backbone of its own that takes no time; not to be changed."""
    return with_images(detector).fit(parts.images[:20], category=parts.category[:20])


def with_images(detector):
    return clone(detector).set_params(backbone=Thumbnails(), max_iter=1, precision="bfloat16")


def copy_of(fitted):
    return pickle.loads(pickle.dumps(fitted))


def assert_same_explanation(a, b):
    for name in ("category", "anomaly_score", "too_far", "group"):
        assert getattr(a, name) == getattr(b, name)
    np.testing.assert_array_equal(a.standardized, b.standardized)
    for name in ("codes", "distances", "terms", "standardized_terms", "contributions"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key], err_msg=f"{name} {key}")


def assert_same_prototypes(a, b, groups=slice(None)):
    assert a.codebooks == b.codebooks
    assert a.grid == b.grid
    for name in ARRAYS:
        for codebook in a.codebooks:
            np.testing.assert_array_equal(getattr(a, name)[codebook], getattr(b, name)[codebook][groups])
    np.testing.assert_array_equal(a.thumbnails, b.thumbnails[: len(a.thumbnails)])


# ---- explain -------------------------------------------------------------------------------------


def stacked(explained, attribute):
    """Of images of one category: an array of all of them for each term."""
    return {
        name: np.stack([getattr(e, attribute)[name] for e in explained]) for name in getattr(explained[0], attribute)
    }


def test_terms_are_exactly_those_of_the_map_and_the_score(fitted, explained):
    """Standardised by what is known of the category, they give the map, and with their highest cells the score."""
    scorer = fitted.scorer_.terms
    for c, category in enumerate(fitted.categories_):
        own = [e for e in explained if e.category == category]
        assert len(own) > 20
        terms, standard = stacked(own, "terms"), stacked(own, "standardized_terms")
        assert terms.keys() == standard.keys() == {t.name for t in scorer.terms}
        for name, term in terms.items():
            mean, spread = (getattr(scorer, f"{kind}_{name}")[c].numpy() for kind in ("mean", "spread"))
            assert term.shape[1:] == scorer.shapes[name][1:]
            np.testing.assert_array_equal(standard[name], (term - mean) / spread)
        numbers = {name: torch.from_numpy(term) for name, term in standard.items()}
        combined = sum(scorer.contributions(numbers).values())
        np.testing.assert_array_equal(combined.numpy(), [e.standardized for e in own])
        peaks = (scorer._peaks(numbers, combined) - scorer.peak_center[c]) / scorer.peak_scale[c]
        weight = scorer.peak_weight[c]
        fused = ((weight * peaks.exp()).sum(1) / weight.sum()).log()
        score = (fused - scorer.ends[c, 0]) / scorer.ends[c, 1]
        expected = [e.anomaly_score - FAR_WEIGHT * e.too_far for e in own]
        np.testing.assert_allclose(score, expected, rtol=1e-9, atol=1e-9)
    found = np.stack([resize_map(e.standardized, (8, 8)) for e in explained])
    np.testing.assert_array_equal(found, fitted.anomaly_map(MAPS))


def test_the_map_is_brought_to_the_size_of_the_image(on_images, parts):
    standardized = [e.standardized for e in on_images.explain(parts.images)]
    found = np.stack([resize_map(m, (64, 64)) for m in standardized])
    np.testing.assert_array_equal(found, on_images.anomaly_map(parts.images))


def test_contributions_add_up_to_the_map(fitted, explained):
    for e in explained[::7]:
        assert e.contributions.keys() == fitted.scorer_.terms.weight.keys() <= e.terms.keys()
        assert {heat.shape for heat in e.contributions.values()} == {e.standardized.shape}
        np.testing.assert_allclose(sum(e.contributions.values()), e.standardized, rtol=1e-3, atol=1e-3)
        row, col = e.worst_cell
        assert e.standardized[row, col] == e.standardized.max()


def test_category_and_score_are_what_the_detector_says(fitted, explained):
    np.testing.assert_array_equal([e.category for e in explained], fitted.predict_category(MAPS))
    np.testing.assert_array_equal([-e.anomaly_score for e in explained], fitted.score_samples(MAPS))
    assert all(e.too_far > 0 for e in explained[60:])
    assert np.mean([e.too_far == 0 for e in explained[:60]]) > 0.9


def test_an_explanation_does_not_depend_on_company_or_order(fitted, explained):
    some = np.random.default_rng(0).permutation(len(MAPS))[:20]
    for i, e in zip(some, fitted.explain(MAPS[some])):
        assert_same_explanation(e, explained[i])
    assert_same_explanation(fitted.explain(MAPS[7:8])[0], explained[7])


def test_explaining_changes_no_score(fitted):
    made = copy_of(fitted)
    before = made.score_samples(MAPS)
    made.explain(MAPS[:5])
    np.testing.assert_array_equal(made.score_samples(MAPS), before)


FORMS = {
    "floats": lambda x, folder: x / 255,
    "list of arrays": lambda x, folder: list(x),
    "paths": lambda x, folder: save_all(folder, x),
    "lazy collection": lambda x, folder: Fragile(x, 9),
}


def save_all(folder, images):
    paths = [folder / f"{k}.png" for k in range(len(images))]
    for path, image in zip(paths, images):
        Image.fromarray(image).save(path)
    return paths


@pytest.mark.parametrize("form", FORMS)
def test_form_of_X_does_not_change_an_explanation(on_images, parts, tmp_path, form):
    expected = on_images.explain(parts.images[18:22])
    for a, b in zip(on_images.explain(FORMS[form](parts.images[18:22], tmp_path)), expected):
        assert_same_explanation(a, b)


def test_images_of_different_sizes_are_explained_on_one_grid(on_images, parts):
    a, b = on_images.explain([parts.images[0], parts.images[1][:40]])
    assert a.standardized.shape == b.standardized.shape == (8, 8)
    assert_same_explanation(a, on_images.explain(parts.images[:1])[0])


def encoded(fitted, X, category):
    """What the model quantises, (n, cells, D) of each codebook, one image at a time."""
    scaling = fitted.scorer_.scaling
    scaled = ((torch.from_numpy(X) - scaling.mean_0) / scaling.scale_0).permute(0, 3, 1, 2)
    out = {}
    with torch.no_grad():
        for x, c in zip(scaled[:, None], torch.from_numpy(category)[:, None]):
            made = fitted.model_(x, c)
            if isinstance(fitted, HVQTransDetector):
                found = {f"level_{j}": level.input for j, level in enumerate(made.levels)}
            else:
                found = {f"pattern_{k}": at.encoded.flatten(2).mT for k, at in enumerate(made.codes.conditions, 1)}
                top = fitted.model_.pool(x)[3].mean((2, 3))
                found["concept"] = fitted.model_.hierarchy.concept_encoder.eval()(top.repeat(2, 1))[:1, None]
            for name, vectors in found.items():
                out.setdefault(name, []).append(vectors)
    return {name: torch.cat(vectors).double() for name, vectors in out.items()}


def test_codes_are_the_nearest_and_distances_are_to_them(fitted, explained):
    some = explained[::6]
    category = np.searchsorted(fitted.categories_, [e.category for e in some])
    for name, vectors in encoded(fitted, MAPS[::6], category).items():
        embed = fitted.model_.codebooks()[name].embed.double()
        for e, cells in zip(some, vectors):
            to_each = torch.cdist(cells, embed[e.group])
            distance, code = e.distances[name].ravel(), e.codes[name].ravel()
            np.testing.assert_allclose(distance, to_each[np.arange(len(code)), code], rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(distance, to_each.amin(1), rtol=1e-3, atol=1e-4)


def test_an_explanation_is_of_the_model_that_there_is(fitted, explained):
    """Whatever the parameters were set to since."""
    sizes = (
        {"n_codes": 4} if isinstance(fitted, HVQTransDetector) else {"n_patterns": 4, "n_concepts": 2, "d_concept": 2}
    )
    for mine, theirs in zip(copy_of(fitted).set_params(**sizes).explain(MAPS), explained, strict=True):
        assert_same_explanation(mine, theirs)


def test_codes_are_of_the_category_or_of_all(fitted, explained):
    groups = {e.category: e.group for e in explained}
    assert groups == ({"a": 0, "b": 1} if isinstance(fitted, HVQTransDetector) else {"a": 0, "b": 0})
    for e in explained[:3]:
        assert e.codes.keys() == e.distances.keys() == set(fitted.prototypes_.codebooks)
        for name, codes in e.codes.items():
            assert codes.shape == fitted.prototypes_.grid[name] == e.distances[name].shape
            assert codes.dtype == np.int64


def test_rows_of_features_have_a_single_cell(detector):
    rows = MAPS.mean((1, 2))
    made = clone(detector).fit(rows[:60], category=KIND)
    (e,) = made.explain(rows[:1])
    assert e.standardized.shape == (1, 1)
    assert made.prototypes_.of(e, made.prototypes_.codebooks[0]).cell == (0, 0)


def test_a_cell_of_the_map_lies_in_a_cell_of_every_codebook():
    codes = {"same": np.zeros((4, 6), int), "half": np.zeros((2, 3), int), "odd": np.zeros((3, 5), int)}
    heat = np.zeros((4, 6))
    heat[3, 4] = 1
    e = Explanation("a", 0.0, 0.0, 0, codes, {}, {}, {}, {}, heat)
    assert e.worst_cell == (3, 4)
    assert [e.cell_of(name) for name in codes] == [(3, 4), (1, 2), (2, 3)]
    assert e.cell_of("half", (1, 1)) == (0, 0)
    with pytest.raises(ValueError, match=r"cell must be .* map of 4 x 6 cells; got \(4, 0\)"):
        e.cell_of("half", (4, 0))
    with pytest.raises(ValueError, match="codebook must be one of 'same', 'half', 'odd'; got 'level_9'"):
        e.cell_of("level_9")


def test_what_is_not_fitted_has_neither(detector):
    with pytest.raises(NotFittedError):
        clone(detector).explain(MAPS)
    with pytest.raises(NotFittedError):
        _ = clone(detector).prototypes_
    assert not hasattr(clone(detector), "prototypes_")


# ---- prototypes ----------------------------------------------------------------------------------


def test_a_prototype_is_the_nearest_of_all_patches_with_its_code(fitted, explained):
    prototypes, known = fitted.prototypes_, explained[:60]
    assert [e.category for e in known] == KIND.tolist(), "here images are judged as what they are"
    for name in prototypes.codebooks:
        codes, far = (np.stack([of[name] for of in each]) for each in ([e.codes for e in known],
                                                                       [e.distances for e in known]))  # fmt: skip
        group = np.array([e.group for e in known])[:, None, None]
        n_groups, n_codes = prototypes.usage[name].shape
        for g in range(n_groups):
            for code in range(n_codes):
                has = (codes == code) & (group == g)
                assert prototypes.usage[name][g, code] == has.sum()
                found = prototypes.get(name, code, g)
                if not has.any():
                    assert found is None
                    assert prototypes.image[name][g, code] == -1
                    continue
                assert has[found.image, found.cell[0], found.cell[1]]
                assert found.distance == far[found.image, found.cell[0], found.cell[1]] == far[has].min()
                assert found.usage == has.sum()
                assert found.thumbnail is None


def test_codes_that_no_normal_image_has_have_no_prototype():
    rng = np.random.default_rng(0)
    few = clone(DETECTORS[0]).set_params(n_codes=64, false_alarm_rate=0.5).fit(rng.standard_normal((12, 2, 2, 4)))
    prototypes = few.prototypes_
    unused = np.flatnonzero(prototypes.usage["level_0"][0] == 0)
    assert len(unused)  # 48 cells for 64 codes
    assert prototypes.get("level_0", unused[0]) is None
    assert np.isinf(prototypes.distance["level_0"][0, unused]).all()
    used = prototypes.most_used("level_0")
    assert not set(used) & set(unused)
    assert (np.diff(prototypes.usage["level_0"][0, used]) <= 0).all()
    assert f"({len(used)} of 64 codes used)" in repr(prototypes)


def test_the_worst_cell_leads_to_the_prototype_of_its_code(fitted, explained):
    for e in explained[::9]:
        for name in fitted.prototypes_.codebooks:
            code = e.codes[name][e.cell_of(name)]
            assert fitted.prototypes_.of(e, name) == fitted.prototypes_.get(name, code, e.group)


def test_images_are_numbered_as_they_came(detector, fitted):
    order = np.random.default_rng(0).permutation(84)
    y = np.where(order < 60, 1, -1)
    made = clone(detector).fit(MAPS[order], y, category=np.append(KIND, np.full(24, "c"))[order])
    assert made.prototypes_.n_images == 84
    for name, image in made.prototypes_.image.items():
        assert (order[image[image >= 0]] < 60).all()
        found = [made.prototypes_.image[name], made.prototypes_.cell[name], made.prototypes_.distance[name]]
        g, code = np.argwhere(image >= 0)[0]
        e = made.explain(MAPS[order][image[g, code]][None])[0]
        at = tuple(found[1][g, code])
        assert e.codes[name][at] == code
        assert e.distances[name][at] == found[2][g, code]


def test_prototypes_do_not_depend_on_how_many_images_are_looked_at_together(detector, fitted, monkeypatch):
    monkeypatch.setattr(vqad.prototypes, "_PART", 7)
    assert_same_prototypes(clone(detector).fit(KNOWN, category=KIND).prototypes_, fitted.prototypes_)


def test_a_warm_start_finds_prototypes_anew(detector, fitted):
    made = copy_of(fitted).set_params(warm_start=True).fit(KNOWN, category=KIND)
    explained = made.explain(KNOWN)
    for name, usage in made.prototypes_.usage.items():
        codes = np.concatenate([(e.group * usage.shape[1] + e.codes[name]).ravel() for e in explained])
        np.testing.assert_array_equal(usage.ravel(), np.bincount(codes, minlength=usage.size))
    assert made.prototypes_.n_images == 60


def test_what_does_not_exist_is_refused(fitted):
    name = fitted.prototypes_.codebooks[0]
    n_groups, n_codes = fitted.prototypes_.usage[name].shape
    with pytest.raises(ValueError, match=f"codebook must be one of '{name}', .*; got 'level'"):
        fitted.prototypes_.get("level", 0)
    for code, group in ((n_codes, 0), (-1, 0), (0, n_groups)):
        with pytest.raises(ValueError, match=rf"codes 0\.\.7 in groups 0\.\.{n_groups - 1}; got code={code}, group"):
            fitted.prototypes_.get(name, code, group)


# ---- thumbnails ----------------------------------------------------------------------------------


def test_a_thumbnail_is_the_patch_around_the_cell(on_images, parts):
    prototypes = on_images.prototypes_
    n_checked = 0
    for name in prototypes.codebooks:
        rows, cols = prototypes.grid[name]
        for g, code in np.argwhere(prototypes.image[name] >= 0):
            found = prototypes.get(name, code, g)
            image = parts.images[found.image]
            top, left, height, width = prototypes.box(name, found.cell, image.shape)
            y, x = (found.cell[0] + 0.5) * 64 / rows, (found.cell[1] + 0.5) * 64 / cols
            assert top <= y <= top + height
            assert left <= x <= left + width
            assert found.thumbnail.shape == (32, 32, 3)
            np.testing.assert_array_equal(prototypes.patch(image, name, found.cell), found.thumbnail)
            if (height, width) == (32, 32):
                np.testing.assert_array_equal(found.thumbnail, image[top : top + 32, left : left + 32])
                n_checked += 1
    assert n_checked


@given(data=st.data(), rows=st.integers(1, 40), cols=st.integers(1, 40))
def test_a_patch_lies_in_the_image_and_holds_the_middle_of_its_cell(data, rows, cols):
    prototypes = Prototypes()
    prototypes.grid["level_0"] = (rows, cols)
    shape = data.draw(st.tuples(st.integers(1, 500), st.integers(1, 500)))
    cell = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    top, left, height, width = prototypes.box("level_0", cell, shape)
    for start, length, side, k, n in zip((top, left), (height, width), shape, cell, (rows, cols)):
        assert 0 <= start < start + length <= side
        assert start - 1 <= (k + 0.5) * side / n <= start + length + 1
    assert prototypes.patch(np.zeros((*shape, 3)), "level_0", cell).shape == (32, 32, 3)


def test_a_patch_is_of_an_image_in_any_form(tmp_path):
    prototypes = Prototypes()
    prototypes.grid["level_0"] = (4, 4)
    grey = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    rgb = np.repeat(grey[:, :, None], 3, axis=2)
    expected = prototypes.patch(rgb, "level_0", (1, 2))
    assert expected.std() > 10
    forms = grey, grey.astype(np.uint16) * 257, (rgb / 255.0), Image.fromarray(rgb), str(tmp_path / "a.png")
    for image in forms:
        np.testing.assert_array_equal(prototypes.patch(image, "level_0", (1, 2)), expected)
    with pytest.raises(ValueError, match="float pixels from"):
        prototypes.patch(rgb.astype(float), "level_0", (1, 2))
    with pytest.raises(ValueError, match=r"a row and a column on the grid of 4 x 4; got \(1, 4\)"):
        prototypes.patch(rgb, "level_0", (1, 4))


def test_thumbnails_are_bounded_even_and_of_the_most_used_codes(detector, parts, monkeypatch):
    monkeypatch.setattr(vqad.prototypes, "MAX_THUMBNAILS", 10)
    prototypes = with_images(detector).fit(parts.images[:20], category=parts.category[:20]).prototypes_
    assert prototypes.thumbnails.shape == (10, 32, 32, 3)
    kept = {(name, g): np.flatnonzero(row >= 0) for name, slot in prototypes.slot.items() for g, row in enumerate(slot)}
    assert sum(map(len, kept.values())) == 10
    for (name, g), codes in kept.items():
        used = prototypes.most_used(name, g)
        assert set(codes) == set(used[: len(codes)])
        if len(codes) < len(used):
            assert len(codes) >= max(map(len, kept.values())) - 1


def test_images_with_a_thumbnail_are_read_once_more_and_no_others(detector, parts, monkeypatch):
    monkeypatch.setattr(vqad.prototypes, "MAX_THUMBNAILS", 3)
    X = Fragile(parts.images, 2)
    made = with_images(detector).fit(X, parts.target, category=parts.category)
    prototypes = made.prototypes_
    shown = {prototypes.image[name][slot >= 0].tolist()[k] for name, slot in prototypes.slot.items()
             for k in range((slot >= 0).sum())}  # fmt: skip
    normal = np.flatnonzero(parts.target == 1).tolist()
    assert len(prototypes.thumbnails) == 3
    assert sorted(X.asked) == sorted([*normal, *shown])


def test_images_that_cannot_be_read_again_cost_their_thumbnails_alone(detector, parts, on_images):
    with pytest.warns(UserWarning, match=r"\d+ images could not be read a second time, .* no thumbnails. .* is gone"):
        made = with_images(detector).fit(Fragile(parts.images[:20], 1), category=parts.category[:20])
    assert len(made.prototypes_.thumbnails) == 0
    np.testing.assert_array_equal(made.score_samples(parts.images), on_images.score_samples(parts.images))
    for name, image in made.prototypes_.image.items():
        np.testing.assert_array_equal(image, on_images.prototypes_.image[name])
        assert (made.prototypes_.slot[name] == -1).all()


@pytest.mark.parametrize("n_jobs", [None, 3])
def test_thumbnails_are_of_the_image_as_the_backbone_sees_it(parts, tmp_path, n_jobs):
    sizes = [parts.images[k] if k % 2 else parts.images[k].repeat(2, 0).repeat(2, 1) for k in range(20)]
    small = HVQTransDetector(
        stages=(1,), patch_size=1, image_size=64, n_codes=4, d_model=16, n_layers=1, n_heads=2, dim_feedforward=8,
        max_iter=1, false_alarm_rate=0.2, random_state=0, n_jobs=n_jobs,
    )  # fmt: skip
    prototypes = small.fit(save_all(tmp_path, sizes), category=parts.category[:20]).prototypes_
    assert (prototypes.slot["level_0"][prototypes.image["level_0"] >= 0] >= 0).all()
    for g, code in np.argwhere(prototypes.image["level_0"] >= 0):
        found = prototypes.get("level_0", code, g)
        expected = prototypes.patch(parts.images[found.image], "level_0", found.cell)
        assert np.abs(found.thumbnail.astype(int) - expected).mean() < 4  # enlarged, and brought back


def test_thumbnails_can_be_forgotten(on_images, tmp_path):
    made = copy_of(on_images)
    name = made.prototypes_.codebooks[0]
    code = made.prototypes_.most_used(name)[0]
    image = made.prototypes_.get(name, code).image
    made.prototypes_.forget_thumbnails()
    assert made.prototypes_.get(name, code).thumbnail is None
    assert made.prototypes_.get(name, code).image == image
    assert on_images.prototypes_.get(name, code).thumbnail is not None
    with pytest.warns(UserWarning, match="does not hold"):
        vqad.save(made, tmp_path / "without.safetensors")
    with pytest.warns(UserWarning, match="does not hold"):
        vqad.save(on_images, tmp_path / "with.safetensors")
    less = [(tmp_path / f"{kind}.safetensors").stat().st_size for kind in ("with", "without")]
    assert less[0] - less[1] >= on_images.prototypes_.thumbnails.nbytes
    loaded = vqad.load(tmp_path / "without.safetensors", backbone=Thumbnails().fit(None))
    assert len(loaded.prototypes_.thumbnails) == 0


# ---- partial_fit ---------------------------------------------------------------------------------


def test_a_new_category_leaves_the_prototypes_of_the_others_as_they_are(fitted):
    made = copy_of(fitted).partial_fit(MAPS[60:], category=["c"] * 24)
    before, after = fitted.prototypes_, made.prototypes_
    n = before.n_groups
    assert after.n_groups == n + 1
    assert_same_prototypes(before, after, slice(n))
    assert after.n_images == 84
    explained = made.explain(MAPS[60:])
    assert {e.category for e in explained} == {"c"}
    assert {e.group for e in explained} == {n}
    for name, usage in after.usage.items():
        codes = np.stack([e.codes[name] for e in explained])
        np.testing.assert_array_equal(usage[n], np.bincount(codes.ravel(), minlength=usage.shape[1]))
        for code in after.most_used(name, n):
            found = after.get(name, code, n)
            assert 60 <= found.image < 84
            assert codes[found.image - 60][found.cell] == code


def test_more_images_of_a_known_category_leave_all_prototypes(fitted):
    made = copy_of(fitted).partial_fit(make_maps(20, seed=1), category=np.array(["a", "b"])[np.arange(20) % 2])
    assert_same_prototypes(fitted.prototypes_, made.prototypes_)
    assert made.prototypes_.n_images == 80


def test_a_new_category_gets_thumbnails_however_many_there_are(on_images, monkeypatch):
    more = make_textured_parts(20, 0, categories=("pill",), image_size=64, random_state=1)
    monkeypatch.setattr(vqad.prototypes, "MAX_THUMBNAILS", 1)
    monkeypatch.setattr(vqad.prototypes, "THUMBNAILS_ADDED", 2)
    made = copy_of(on_images).partial_fit(more.images, category=more.category)
    before, after = on_images.prototypes_, made.prototypes_
    assert_same_prototypes(before, after, slice(before.n_groups))
    n_new = len(after.thumbnails) - len(before.thumbnails)
    assert 0 < n_new <= 2 * len(after.codebooks)
    for name in after.codebooks:
        found = after.get(name, after.most_used(name, before.n_groups)[0], before.n_groups)
        image = more.images[found.image - 20]
        np.testing.assert_array_equal(found.thumbnail, after.patch(image, name, found.cell))


def test_a_partial_fit_that_fails_leaves_prototypes_as_they_were(fitted, monkeypatch):
    made = copy_of(fitted)
    before = made.prototypes_
    monkeypatch.setattr(vqad.prototypes.Prototypes, "__init__", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.partial_fit(MAPS[60:], category=["c"] * 24)
    assert made.prototypes_ is before
    assert len(made.categories_) == 2


# ---- kept ----------------------------------------------------------------------------------------


def test_prototypes_survive_pickle_and_a_file(fitted, on_images, tmp_path):
    vqad.save(fitted, tmp_path / "model.safetensors")
    for made in (copy_of(fitted), vqad.load(tmp_path / "model.safetensors")):
        assert_same_prototypes(fitted.prototypes_, made.prototypes_)
        assert made.prototypes_.n_images == 60
        for a, b in zip(made.explain(MAPS[:3]), fitted.explain(MAPS[:3])):
            assert_same_explanation(a, b)
    assert_same_prototypes(on_images.prototypes_, copy_of(on_images).prototypes_)
    assert len(copy_of(on_images).prototypes_.thumbnails)


def test_a_fit_that_fails_leaves_prototypes_as_they_were(detector, on_images, parts):
    made, fresh = copy_of(on_images), clone(on_images)
    before = made.prototypes_
    for each in (made, fresh):
        with pytest.raises(ValueError, match="image 5 of X"):
            each.fit([*parts.images[:5], np.full((64, 64), np.nan)])
    assert made.prototypes_ is before
    assert not hasattr(fresh, "prototypes_")
