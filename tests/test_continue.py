"""Going on: after a kill, from a fitted model, with more images and with categories that were never seen."""

import copy
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

import vqad.calibration
import vqad.checkpoint
import vqad.fitting
from vqad import HVQTransDetector
from vqad.checkpoint import Checkpoint, fingerprint
from vqad.splitting import some_of_each
from vqad.training import Trainer
from vqad.training_run import Run

SMALL = HVQTransDetector(
    backbone=None, n_codes=8, d_model=16, n_layers=1, n_heads=2, dim_feedforward=16, max_iter=4, batch_size=8,
    dropout=0.1, false_alarm_rate=0.2, random_state=0,
)  # fmt: skip


def make_maps(n=60, n_kinds=3, seed=0):
    """Normal feature maps (n, 4, 4, 6) of some kinds in turn."""
    pattern = 4 * np.random.default_rng(99).standard_normal((5, 4, 4, 6))
    noise = np.random.default_rng(seed).standard_normal((n, 4, 4, 6))
    return (pattern[np.arange(n) % n_kinds] + noise).astype(np.float32)


MAPS = make_maps()
KIND = np.arange(60) % 3
NAMES = np.array(["a", "b", "c"])[KIND]


def small(**parameters):
    return clone(SMALL).set_params(**parameters)


@pytest.fixture(scope="module")
def plain():
    """What a fit that nothing disturbs comes to."""
    return small().fit(MAPS, category=NAMES)


@pytest.fixture(scope="module")
def of_two():
    """Knows the kinds a and b; not to be changed."""
    return small().fit(MAPS[KIND < 2], category=NAMES[KIND < 2])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the checkpoint of the fit that is ``plain``; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    small(checkpoint_dir=folder).fit(MAPS, category=NAMES)
    return folder


# Sums of whole numbers are the same in any order.
ROUNDED = np.round(MAPS)


@pytest.fixture(scope="module")
def finished_of_rounded(tmp_path_factory):
    """The same of rounded maps."""
    folder = tmp_path_factory.mktemp("rounded")
    small(checkpoint_dir=folder).fit(ROUNDED, category=NAMES)
    return folder


def copy_of(detector, **parameters):
    made = clone(detector).set_params(**parameters)
    vars(made).update({name: value for name, value in vars(detector).items() if name not in detector.get_params()})
    return made


def count_steps(monkeypatch):
    steps = []
    backward = Trainer._backward
    monkeypatch.setattr(
        Trainer, "_backward", lambda self, *batch: steps.append(len(batch[1])) or backward(self, *batch)
    )
    return steps


# ---- after a kill --------------------------------------------------------------------------------

# One process that imports everything once, and a fork of it for every fit: half of them kill themselves. A step
# before them has torch import what it needs for its first optimiser, which takes three times as long as a fit.
SCRIPT = """
import json, os, signal, sys
import numpy as np
import torch
import vqad.checkpoint
import vqad.fitting
from vqad.training import Trainer
sys.path.insert(0, sys.argv[1])
from test_continue import MAPS, NAMES, small

first = torch.zeros(1, requires_grad=True)
first.grad = torch.ones(1)
torch.optim.AdamW([first]).step()
vqad.checkpoint.SECONDS_BETWEEN = vqad.checkpoint.WRITING_TIMES = 0
folder = sys.argv[2]

def die_at(owner, name, number, after=False):
    real, calls = getattr(owner, name), []
    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, wrapped)

def fit(case, deadly, **parameters):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    np.random.seed(os.getpid())
    steps = []
    if deadly:
        die_at(*deadly)
    backward = Trainer._backward
    Trainer._backward = lambda self, *batch: steps.append(1) or backward(self, *batch)
    made = small(**parameters).fit(MAPS, category=NAMES)
    np.savez(f"{folder}/{case}.npz", scores=made.score_samples(MAPS), loss=made.loss_curve_, offset=made.offset_,
             steps=len(steps))
    os._exit(0)

moments = {
    "before the first step": (Trainer, "_backward", 1),
    "in the first pass": (Trainer, "_backward", 3),
    "in a later pass": (Trainer, "_backward", 17),
    "in validation": (Trainer, "evaluate", 2),
    "while writing": (os, "fsync", 9),
    "when a file was written": (os, "replace", 9),
    "when a file was put in place": (os, "replace", 9, True),
    "in calibration": (vqad.fitting, "learn_terms", 1),
    "after calibration": (vqad.fitting, "learn_terms", 1, True),
}
killed = {}
for case, deadly in moments.items():
    parameters = dict(checkpoint_dir=f"{folder}/{case}", early_stopping=True)
    killed[case] = fit(case, deadly, **parameters)
    fit(case, None, **parameters)
fit("undisturbed", None, early_stopping=True)

status, times = 1, 0
while status:
    status = fit("again and again", (Trainer, "_backward", 4), checkpoint_dir=f"{folder}/again")
    times += status == signal.SIGKILL
fit("undisturbed, all passes", None)

fit("no seed", (Trainer, "_backward", 12), checkpoint_dir=f"{folder}/no seed", random_state=None)
fit("no seed", None, checkpoint_dir=f"{folder}/no seed", random_state=None)
fit("no seed again", None, checkpoint_dir=f"{folder}/no seed", random_state=None)
print(json.dumps({"killed": killed, "times": times, "sigkill": int(signal.SIGKILL)}))
"""

MOMENTS = [
    "before the first step", "in the first pass", "in a later pass", "in validation", "while writing",
    "when a file was written", "when a file was put in place", "in calibration", "after calibration",
]  # fmt: skip


@pytest.fixture(scope="module")
def killings(tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("fits are killed in forks")
    folder = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    made = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), os.path.dirname(__file__), str(folder)],
        capture_output=True, text=True, env=environment, timeout=900,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout), lambda case: np.load(folder / f"{case}.npz")


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_fit_comes_to_the_same_model(killings, moment):
    told, result = killings
    assert told["killed"][moment] == told["sigkill"]
    made, expected = result(moment), result("undisturbed")
    np.testing.assert_array_equal(made["scores"], expected["scores"])
    np.testing.assert_array_equal(made["loss"], expected["loss"])
    assert made["offset"] == expected["offset"]
    saved = expected["steps"] - made["steps"]
    assert saved == {"before the first step": 0, "in the first pass": 2, "in a later pass": 16}.get(moment, saved)
    assert saved > 0 or moment == "before the first step"


@pytest.mark.slow
def test_a_fit_that_is_killed_again_and_again_comes_to_its_end(killings):
    told, result = killings
    assert told["times"] > 3
    np.testing.assert_array_equal(result("again and again")["scores"], result("undisturbed, all passes")["scores"])


@pytest.mark.slow
def test_without_a_random_state_the_seed_is_kept_until_the_fit_is_finished(killings):
    _, result = killings
    made, again = result("no seed"), result("no seed again")
    assert made["steps"] < again["steps"]
    assert not np.array_equal(made["scores"], again["scores"])


def test_a_checkpoint_changes_no_result(plain, tmp_path):
    made = small(checkpoint_dir=tmp_path / "new" / "folder").fit(MAPS, category=NAMES)
    np.testing.assert_array_equal(made.score_samples(MAPS), plain.score_samples(MAPS))


def test_a_finished_fit_is_not_trained_again(plain, finished, monkeypatch):
    steps = count_steps(monkeypatch)
    again = small(checkpoint_dir=str(finished)).fit(MAPS, category=NAMES)
    assert not steps
    assert again.loss_curve_ == plain.loss_curve_
    np.testing.assert_array_equal(again.score_samples(MAPS), plain.score_samples(MAPS))


def test_without_a_random_state_a_fit_that_was_killed_after_its_training_does_not_train_again(tmp_path, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr("vqad.fitting.add_prototypes", lambda *args: sys.exit("killed"))
        with pytest.raises(SystemExit):
            small(checkpoint_dir=tmp_path, random_state=None).fit(MAPS, category=NAMES)
    steps = count_steps(monkeypatch)
    small(checkpoint_dir=tmp_path, random_state=None).fit(MAPS, category=NAMES)
    assert not steps
    small(checkpoint_dir=tmp_path, random_state=None).fit(MAPS, category=NAMES)
    assert len(steps) == 6 * SMALL.max_iter


@pytest.mark.parametrize(
    "change", ["images", "one pixel", "places", "order", "category", "max_iter", "random_state", "learning_rate"]
)
def test_no_other_fit_goes_on_from_a_checkpoint(finished_of_rounded, tmp_path, monkeypatch, change):
    shutil.copytree(finished_of_rounded, tmp_path, dirs_exist_ok=True)
    X, names, parameters = ROUNDED, NAMES, {}
    if change == "images":
        X = make_maps(seed=5)
    elif change == "one pixel":
        X = ROUNDED.copy()
        X[7, 1, 2, 3] += 1
    elif change == "places":
        X = ROUNDED[:, ::-1].copy()
    elif change == "order":
        X, names = ROUNDED[::-1].copy(), NAMES[::-1]
    elif change == "category":
        names = np.roll(NAMES, 1)
    else:
        parameters[change] = {"max_iter": 5, "random_state": 1, "learning_rate": 0.01}[change]
    steps = count_steps(monkeypatch)
    made = small(checkpoint_dir=tmp_path, **parameters).fit(X, category=names)
    assert len(steps) == 6 * made.max_iter
    np.testing.assert_array_equal(
        made.score_samples(MAPS), small(**parameters).fit(X, category=names).score_samples(MAPS)
    )
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_is_lost_or_full_ends_no_training(plain, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    one_pass = Trainer._one_pass
    monkeypatch.setattr(Trainer, "_one_pass", lambda *args: shutil.rmtree(folder, True) or one_pass(*args))
    with pytest.warns(UserWarning, match="The checkpoint could not be written to checkpoint_dir=.*checkpoints"):
        made = small(checkpoint_dir=folder).fit(MAPS, category=NAMES)
    np.testing.assert_array_equal(made.score_samples(MAPS), plain.score_samples(MAPS))


@pytest.mark.parametrize("damage", ["cut short", "one bit", "empty", "text"])
def test_a_damaged_checkpoint_is_said_and_not_used(plain, finished, tmp_path, damage):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"cut short": content[:-100], "one bit": content, "empty": b"", "text": b"text"}[damage])
    with pytest.warns(UserWarning, match="checkpoint .* is damaged .* training starts from the beginning") as record:
        made = small(checkpoint_dir=tmp_path).fit(MAPS, category=NAMES)
    assert record[0].filename == __file__
    np.testing.assert_array_equal(made.score_samples(MAPS), plain.score_samples(MAPS))


def test_reading_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    Checkpoint(tmp_path, "evil", 0).write({"model": Evil()})
    with pytest.warns(UserWarning, match="is damaged or of another version"):
        assert Checkpoint(tmp_path, "evil", 0).state is None
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_folder_that_is_a_file_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"checkpoint_dir='.*file' is not a folder"):
        small(checkpoint_dir=tmp_path / "file").fit(MAPS)


def test_an_interrupted_fit_goes_on_from_its_checkpoint(plain, tmp_path, monkeypatch):
    for name in ("SECONDS_BETWEEN", "WRITING_TIMES"):
        monkeypatch.setattr(vqad.checkpoint, name, 0)
    backward, steps = Trainer._backward, []

    def interrupted(self, *batch):
        steps.append(1)
        if len(steps) == 9:
            raise KeyboardInterrupt
        return backward(self, *batch)

    monkeypatch.setattr(Trainer, "_backward", interrupted)
    with pytest.warns(UserWarning, match="interrupted after 1 of 4 passes"):
        small(checkpoint_dir=tmp_path).fit(MAPS, category=NAMES)
    made = small(checkpoint_dir=tmp_path).fit(MAPS, category=NAMES)
    assert len(steps) == 9 + 24 - 8
    np.testing.assert_array_equal(made.score_samples(MAPS), plain.score_samples(MAPS))


def test_leftovers_of_killed_writes_go_away(tmp_path):
    first = Checkpoint(tmp_path, fingerprint("one"), 0)
    old, young = (tmp_path / f"{first.path.stem}-{name}.part" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"cut")
    os.utime(old, (0, 0))
    first = Checkpoint(tmp_path, fingerprint("one"), 0)
    assert not old.exists()
    assert young.exists()
    assert first.state is None


# ---- warm start ----------------------------------------------------------------------------------


def test_a_warm_start_goes_on_with_the_model(plain):
    made = small(warm_start=True).fit(MAPS, category=NAMES)
    np.testing.assert_array_equal(made.score_samples(MAPS), plain.score_samples(MAPS))
    first = made.loss_curve_
    made.fit(MAPS, category=NAMES)
    assert made.n_iter_ == len(made.loss_curve_) == 8
    assert made.loss_curve_[:4] == first
    assert made.loss_curve_[4] < first[0]
    assert made.loss_curve_[7] < first[3]


def test_without_warm_start_a_second_fit_starts_anew(plain):
    made = small().fit(MAPS[:30]).fit(MAPS, category=NAMES)
    np.testing.assert_array_equal(made.score_samples(MAPS), plain.score_samples(MAPS))


@pytest.mark.parametrize("random_state", [0, None])
def test_a_warm_start_holds_out_the_same_images(random_state, monkeypatch):
    trained = []
    start = Run.start_pass
    monkeypatch.setattr(
        Run, "start_pass", lambda self, rows, category: trained.extend(rows.tolist()) or start(self, rows, category)
    )
    made = small(warm_start=True, random_state=random_state).fit(MAPS, category=NAMES)
    first = set(trained)
    trained.clear()
    made.fit(MAPS, category=NAMES)
    assert set(trained) == first
    assert len(first) == 48


def test_a_warm_start_may_change_how_it_trains_but_not_the_shape():
    made = small(warm_start=True).fit(MAPS, category=NAMES)
    made.set_params(learning_rate=1e-4, max_iter=2, dropout=0.0).fit(MAPS, category=NAMES)
    assert made.n_iter_ == 6
    before = made.score_samples(MAPS)
    with pytest.raises(ValueError, match=r"warm_start=True continues with the model of the last fit.*size mismatch"):
        made.set_params(n_codes=16).fit(MAPS, category=NAMES)
    np.testing.assert_array_equal(made.score_samples(MAPS), before)


@pytest.mark.parametrize("names", [np.where(NAMES == "c", "d", NAMES), np.where(NAMES == "c", "b", NAMES)])
def test_a_warm_start_needs_the_same_categories(plain, names):
    with pytest.raises(ValueError, match=r"needs images of all categories \['a', 'b', 'c'\]; got .* Use partial_fit"):
        copy_of(plain, warm_start=True).fit(MAPS, category=names)
    with pytest.raises(ValueError, match="has labels such as 0, but the detector knows 'a', 'b', 'c'"):
        copy_of(plain, warm_start=True).fit(MAPS, category=KIND)


def test_a_warm_start_without_labels_needs_images_of_every_category(plain):
    """Else it would forget how normal images of the missing ones score."""
    made = copy_of(plain, warm_start=True)
    with pytest.raises(ValueError, match=r"no image is nearest to \['b', 'c'\]. Use partial_fit"):
        made.fit(MAPS[KIND == 0])
    np.testing.assert_array_equal(made.score_samples(MAPS), plain.score_samples(MAPS))


def test_a_warm_start_goes_on_with_found_categories():
    made = small(warm_start=True).fit(MAPS)
    found = made.predict_category(MAPS)
    made.fit(MAPS)
    np.testing.assert_array_equal(made.predict_category(MAPS), found)
    assert made.n_iter_ == 8


def test_a_warm_start_has_a_checkpoint_of_its_own(tmp_path, monkeypatch):
    once = small(warm_start=True, checkpoint_dir=tmp_path).fit(MAPS, category=NAMES)
    before = copy_of(once)
    twice = once.fit(MAPS, category=NAMES)
    steps = count_steps(monkeypatch)
    again = before.fit(MAPS, category=NAMES)
    assert not steps
    np.testing.assert_array_equal(again.score_samples(MAPS), twice.score_samples(MAPS))


# ---- more images, and categories never seen ------------------------------------------------------


def state_of(detector):
    return {k: v.clone() for k, v in detector.model_.state_dict().items()}


@pytest.mark.parametrize("transport", ["nearest", "sinkhorn"])
@pytest.mark.parametrize("threshold", ["global", "category"])
def test_a_new_category_moves_no_score_of_the_old_ones(threshold, transport):
    """Neither score nor map, to the last bit, of normal and of odd images."""
    made = small(threshold=threshold, transport=transport, contamination="auto")
    made.fit(MAPS[KIND < 2], category=NAMES[KIND < 2])
    odd = make_maps(30, 2, seed=4)
    odd[:, 1:3, 1:3] += np.linspace(0, 20, 30)[:, None, None, None]
    X = np.concatenate([make_maps(30, 2, seed=3), odd.astype(np.float32)])
    category, scores, maps, p = made.predict_category(X), made.score_samples(X), made.anomaly_map(X), made.p_values(X)
    offset, limit = made.offset_, made.scorer_.router.limit.numpy()
    made.partial_fit(MAPS[KIND == 2], category=NAMES[KIND == 2])
    assert list(made.categories_) == ["a", "b", "c"]
    stays = made.predict_category(X) == category
    assert stays[:30].all()
    assert stays.sum() >= 45
    np.testing.assert_array_equal(made.score_samples(X)[stays], scores[stays])
    np.testing.assert_array_equal(made.anomaly_map(X)[stays], maps[stays])
    np.testing.assert_array_equal(made.scorer_.router.limit.numpy()[:2], limit)
    if threshold == "category":
        np.testing.assert_array_equal(made.offset_[:2], offset)
        np.testing.assert_array_equal(made.p_values(X)[stays], p[stays])


@pytest.mark.parametrize("patch_size", [1, 2])
def test_a_new_category_is_known_afterwards(of_two, patch_size):
    # Medians and spreads of four held-out images a kind would scatter by two deviations.
    made = small(patch_size=patch_size, calibration_fraction=0.4).fit(MAPS[KIND < 2], category=NAMES[KIND < 2])
    fresh = make_maps(30, 3, seed=7)
    unknown = made.score_samples(fresh)
    made.partial_fit(MAPS[KIND == 2], category=NAMES[KIND == 2])
    assert list(made.predict_category(fresh)) == ["a", "b", "c"] * 10
    of_new = np.arange(30) % 3 == 2
    assert unknown[of_new].max() < unknown[~of_new].min()
    assert abs(np.median(made.score_samples(fresh)[of_new])) < 2
    assert (made.predict(fresh) == 1).mean() > 0.6
    assert made.n_iter_ == len(made.loss_curve_) == 8
    assert made.n_images_ == 60


def test_a_new_category_leaves_what_is_shared_and_what_others_own(of_two):
    made = small().fit(MAPS[KIND < 2], category=NAMES[KIND < 2])
    before = state_of(made)
    made.partial_fit(MAPS[KIND == 2], category=NAMES[KIND == 2])
    after = state_of(made)
    for name, value in before.items():
        kept = after[name][:2] if name.startswith("codebook.") else after[name]
        assert torch.equal(kept, value), name
    assert {name for name in after if name not in before} == {"output_projection.2.weight", "output_projection.2.bias"}
    mean = (before["output_projection.0.weight"] + before["output_projection.1.weight"]) / 2
    assert not torch.equal(after["output_projection.2.weight"], mean)
    assert all(p.requires_grad for p in made.model_.parameters())


def test_more_images_of_a_category_teach_it_and_no_other():
    made = small().fit(MAPS, category=NAMES)
    before, other = state_of(made), make_maps(40, 3, seed=8)
    is_a = np.arange(40) % 3 == 0
    scores = made.score_samples(other)
    n_held = len(made.fitted_.held_out.score)
    made.partial_fit(other[is_a], category=["a"] * is_a.sum())
    after = state_of(made)
    np.testing.assert_array_equal(made.score_samples(other)[~is_a], scores[~is_a])
    assert not np.array_equal(made.score_samples(other)[is_a], scores[is_a])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in changed} == {"codebook", "output_projection"}
    assert "output_projection.1.weight" not in changed
    for name in changed & {"codebook.0.embed", "codebook.1.embed"}:
        assert torch.equal(after[name][1:], before[name][1:])
        assert not torch.equal(after[name][0], before[name][0])
    assert made.n_iter_ == 5
    assert len(made.fitted_.held_out.score) == n_held + 3


def test_ctrl_c_between_known_and_new_categories_keeps_none_that_was_never_trained(of_two, monkeypatch):
    made = copy_of(of_two)

    def interrupted(model):
        raise KeyboardInterrupt

    monkeypatch.setattr("vqad.training.codebook_perplexity", interrupted)
    with pytest.warns(UserWarning, match="interrupted after 1 of 1 passes"), pytest.raises(KeyboardInterrupt):
        made.partial_fit(MAPS, category=NAMES)
    assert list(made.categories_) == ["a", "b"]


def test_where_no_category_can_be_held_out_one_threshold_each_comes_from_trained_images(of_two):
    made = copy_of(of_two, threshold="category")
    with pytest.warns(UserWarning, match="There are too few images to hold any out"):
        made.partial_fit(np.concatenate([MAPS[KIND < 2], MAPS[2:3]]), category=[*NAMES[KIND < 2], "c"])
    assert made.offset_.shape == (3,)
    with pytest.warns(UserWarning, match="There are too few groups to hold any out"):
        small(threshold="category").fit(MAPS[::3], category=["a"] * 20, groups=[0] * 20)


def test_ctrl_c_ends_partial_fit(of_two, monkeypatch):
    steps = []

    def interrupted(self, *batch):
        steps.append(batch)
        raise KeyboardInterrupt

    made = copy_of(of_two)
    monkeypatch.setattr(Trainer, "_backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.partial_fit(MAPS, category=NAMES)  # a and b are known, c is new
    assert len(steps) == 1
    assert list(made.categories_) == ["a", "b"]
    np.testing.assert_array_equal(made.score_samples(MAPS), of_two.score_samples(MAPS))


def test_a_label_with_a_typing_error_is_pointed_out(of_two):
    with pytest.warns(UserWarning, match="Category 'aa' has a single image.*correct the label"):
        copy_of(of_two).partial_fit(MAPS[:1], category=["aa"])


def test_drifted_images_become_normal():
    """Of a category whose products now look a little different, further ones are no anomalies any more."""
    made = small().fit(MAPS, category=NAMES)
    drift = 1.5 * np.random.default_rng(6).standard_normal((4, 4, 6)).astype(np.float32)
    new, later = (make_maps(120, 3, seed=s)[::3] + drift for s in (9, 10))
    before, called_normal = made.score_samples(later), (made.predict(later) == 1).mean()
    for _ in range(3):
        made.partial_fit(new, category=["a"] * 40)
    after = made.score_samples(later)
    assert np.median(after) > np.median(before)
    assert (made.predict(later) == 1).mean() > max(0.6, called_normal + 0.3)


def test_known_and_new_categories_in_one_call(of_two):
    made = small().fit(MAPS[KIND < 2], category=NAMES[KIND < 2])
    made.partial_fit(make_maps(50, 5, seed=11), category=np.array(["a", "b", "c", "d", "e"])[np.arange(50) % 5])
    assert list(made.categories_) == ["a", "b", "c", "d", "e"]
    assert made.n_iter_ == 4 + 1 + 4
    fresh = make_maps(50, 5, seed=12)
    assert list(made.predict_category(fresh)) == ["a", "b", "c", "d", "e"] * 10
    assert np.isfinite(made.score_samples(fresh)).all()


def test_categories_are_added_one_after_the_other(of_two):
    made = small().fit(MAPS[KIND < 2], category=NAMES[KIND < 2])
    more = make_maps(50, 5, seed=11)
    made.partial_fit(more[4::5], category=["e"] * 10)
    scores = made.score_samples(more[4::5])
    made.partial_fit(more[2::5], category=["c"] * 10)
    assert list(made.categories_) == ["a", "b", "e", "c"]
    np.testing.assert_array_equal(made.score_samples(more[4::5]), scores)
    made.set_params(warm_start=True).fit(more[[0, 1, 2, 4] * 3 + [5, 6, 7, 9]], category=list("abce" * 4))
    assert list(made.predict_category(more[[0, 1, 2, 4]])) == ["a", "b", "c", "e"]


def test_without_labels_images_join_the_category_that_they_look_like():
    made = small().fit(MAPS, category=NAMES)
    before = state_of(made)
    made.partial_fit(make_maps(30, 3, seed=13)[1::3])
    after = state_of(made)
    assert list(made.categories_) == ["a", "b", "c"]
    embed = "codebook.0.embed"
    assert [torch.equal(after[embed][c], before[embed][c]) for c in range(3)] == [True, False, True]


@pytest.mark.parametrize(("names", "label"), [(NAMES, "new 1"), (KIND + 3, 5)])
def test_without_labels_many_images_far_from_all_make_a_category(names, label):
    made = small().fit(MAPS[KIND < 2], category=names[KIND < 2])
    with pytest.warns(UserWarning, match=f"20 images are too far from all known categories .* new ones: {label!r}"):
        made.partial_fit(MAPS[KIND == 2])
    assert set(made.predict_category(make_maps(30, 3, seed=7)[2::3])) == {label}
    with pytest.warns(UserWarning, match="new ones: " + ("'new 2'" if label == "new 1" else "6")):
        made.partial_fit(make_maps(40, 4, seed=14)[3::4])
    assert len(made.categories_) == 4


def test_names_of_new_categories_are_free():
    names = np.where(KIND == 0, "new 2", "x")
    made = small().fit(MAPS[KIND < 2], category=names[KIND < 2])
    with pytest.warns(UserWarning, match="new ones: 'new 1'"):
        made.partial_fit(MAPS[KIND == 2])
    with pytest.warns(UserWarning, match="new ones: 'new 3'"):
        made.partial_fit(make_maps(40, 4, seed=14)[3::4])
    assert list(made.categories_) == ["new 2", "x", "new 1", "new 3"]


def test_without_labels_few_images_far_from_all_are_left_out():
    made = small().fit(MAPS[KIND < 2], category=NAMES[KIND < 2])
    scores = made.score_samples(MAPS)
    with pytest.warns(UserWarning, match="4 images are too far .* left out") as record:
        made.partial_fit(MAPS[2:12:3])
    assert record[0].filename == __file__
    np.testing.assert_array_equal(made.score_samples(MAPS), scores)
    with pytest.warns(UserWarning, match="4 images are too far"):
        made.partial_fit(np.concatenate([MAPS[2:12:3], make_maps(30, 2, seed=15)[::2]]))
    assert made.n_images_ == 40 + 15


def test_the_first_call_is_fit(plain):
    made = small()
    with pytest.raises(NotFittedError):
        made.predict(MAPS)
    assert made.partial_fit(MAPS, category=NAMES) is made
    np.testing.assert_array_equal(made.score_samples(MAPS), plain.score_samples(MAPS))


@pytest.mark.parametrize("known", [True, False])
def test_a_single_image_is_enough(known):
    made = small().fit(MAPS[KIND < 2], category=NAMES[KIND < 2])
    offset = made.offset_
    if known:
        made.partial_fit(MAPS[:1], category=["a"])
        assert made.offset_ == offset
    else:
        with pytest.warns(UserWarning, match="There are too few images to hold any out"):
            made.partial_fit(MAPS[2:3], category=["c"])
        assert list(made.predict_category(MAPS[2::3])) == ["c"] * 20
    assert np.isfinite(made.score_samples(MAPS)).all()


def test_anomalies_are_left_out_and_only_anomalies_is_an_error(plain):
    made = copy_of(plain)
    with pytest.raises(ValueError, match="y is -1 for every image"):
        made.partial_fit(MAPS[:5], [-1] * 5)
    some = small().fit(MAPS, category=NAMES)
    other = small().fit(MAPS, category=NAMES)
    more, y = make_maps(12, 3, seed=16), np.where(np.arange(12) < 6, 1, -1)
    some.partial_fit(more, y, category=NAMES[:12])
    other.partial_fit(more[:6], category=NAMES[:6])
    np.testing.assert_array_equal(some.score_samples(MAPS), other.score_samples(MAPS))


def test_labels_of_another_type_are_explained(plain):
    with pytest.raises(ValueError, match="has labels such as 1, but the detector knows 'a', 'b', 'c'"):
        copy_of(plain).partial_fit(MAPS, category=KIND + 1)


def test_a_call_that_fails_changes_nothing(plain, monkeypatch):
    made = small(threshold="category").fit(MAPS[KIND < 2], category=NAMES[KIND < 2])
    scores, n_images = made.score_samples(MAPS), made.n_images_
    with pytest.raises(ValueError, match="at least 2 images of each category; d has 1"):
        made.partial_fit(MAPS[:21], category=[*NAMES[:20], "d"])
    with monkeypatch.context() as patch:
        patch.setattr(vqad.fitting, "set_thresholds", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            made.partial_fit(MAPS[KIND == 2], category=NAMES[KIND == 2])
    assert list(made.categories_) == ["a", "b"]
    assert made.n_images_ == n_images
    np.testing.assert_array_equal(made.score_samples(MAPS), scores)
    made.partial_fit(MAPS[KIND == 2], category=NAMES[KIND == 2])
    assert list(made.categories_) == ["a", "b", "c"]


@pytest.mark.parametrize("threshold", ["global", "category"])
def test_contamination_counts_all_images_learned_from(threshold):
    made = small(contamination=0.1, threshold=threshold).fit(MAPS[KIND < 2], category=NAMES[KIND < 2])
    offset = made.offset_
    made.partial_fit(MAPS[KIND == 2], category=NAMES[KIND == 2])
    scores = made.score_samples(MAPS)
    if threshold == "global":
        assert made.offset_ == pytest.approx(np.quantile(scores, 0.1))
    else:
        np.testing.assert_array_equal(made.offset_[:2], offset)
        assert made.offset_[2] == pytest.approx(np.quantile(scores[KIND == 2], 0.1))


def test_contamination_that_is_asked_for_after_fit_counts_the_images_held_out_before():
    made = small().fit(MAPS[KIND < 2], category=NAMES[KIND < 2]).set_params(contamination=0.25)
    held = made.fitted_.held_out.score
    made.partial_fit(MAPS[KIND == 2], category=NAMES[KIND == 2])
    new = made.score_samples(MAPS[KIND == 2])
    assert made.offset_ == pytest.approx(np.quantile(np.append(-held, new), 0.25))


def test_partial_fit_repeats_with_a_random_state(of_two):
    made = [small().fit(MAPS[KIND < 2], category=NAMES[KIND < 2]) for _ in range(2)]
    torch.manual_seed(1)
    for detector in made:
        detector.partial_fit(MAPS[KIND == 2], category=NAMES[KIND == 2])
    np.testing.assert_array_equal(made[0].score_samples(MAPS), made[1].score_samples(MAPS))


# ---- many images ---------------------------------------------------------------------------------


def test_what_is_held_at_a_time_changes_nothing(plain, monkeypatch):
    monkeypatch.setattr(vqad.calibration, "IMAGES_AT_A_TIME", 3)
    made = small().fit(MAPS, category=NAMES)
    np.testing.assert_array_equal(made.score_samples(MAPS), plain.score_samples(MAPS))
    assert made.offset_ == plain.offset_
    whole = small(contamination=0.2).fit(MAPS, category=NAMES).offset_
    monkeypatch.undo()
    assert small(contamination=0.2).fit(MAPS, category=NAMES).offset_ == whole


def test_beyond_some_images_a_category_the_others_are_judged_and_set_no_scale(monkeypatch):
    X, new, names = make_maps(300), make_maps(300, seed=5), np.array(["a", "b", "c"])[np.arange(300) % 3]
    plain = small(batch_size=40).fit(X, category=names)
    monkeypatch.setattr(vqad.calibration, "MAX_REFERENCE_IMAGES", 15)
    monkeypatch.setattr(vqad.calibration, "IMAGES_AT_A_TIME", 2)
    made = small(batch_size=40).fit(X, category=names)
    held, before = made.fitted_.held_out, plain.fitted_.held_out
    for name, values in vars(before).items():
        assert len(vars(held)[name]) == len(values) == 60
    np.testing.assert_array_equal(np.sort(held.category), np.sort(before.category))
    assert np.isfinite(held.peak).all()
    # Those that nothing was learned of are scored as any image.
    known, score = np.sort(-made.score_samples(X)), held.score
    is_judged = score == known[np.searchsorted(known, score).clip(max=299)]
    np.testing.assert_array_equal(np.bincount(held.category[is_judged]), [5, 5, 5])
    assert np.corrcoef(made.score_samples(new), plain.score_samples(new))[0, 1] > 0.8
    assert 0.05 < np.mean(made.predict(new) < 0) < 0.35


def test_a_fit_starts_from_some_images_of_each_category(plain, monkeypatch):
    rows, index = np.arange(100, 190), np.repeat([2, 0, 1], [50, 35, 5])
    some = some_of_each(rows, index, 20, seed=3)
    np.testing.assert_array_equal(np.bincount(index[some - 100]), [20, 5, 20])
    assert (np.diff(some) > 0).all()
    assert some[some < 150].max() > 125  # not the first ones
    np.testing.assert_array_equal(some_of_each(rows, index, 50, seed=3), rows)
    monkeypatch.setattr(vqad.fitting, "START_PER_CATEGORY", 8)
    monkeypatch.setattr(vqad.fitting, "START_IMAGES", 0)
    made, new = small().fit(MAPS, category=NAMES), make_maps(seed=5)
    assert not np.array_equal(made.scorer_.scaling.mean_0, plain.scorer_.scaling.mean_0)
    assert np.mean(made.predict(new) < 0) < 0.5


def test_a_checkpoint_that_takes_long_to_write_is_written_seldom(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path, fingerprint("slow"), 0)
    now = checkpoint._written_at
    checkpoint._writing_took = 10.0
    for waited, due in ((31, False), (199, False), (201, True)):
        monkeypatch.setattr(vqad.checkpoint.time, "monotonic", lambda waited=waited: now + waited)
        assert checkpoint.due(after_pass=False) == checkpoint.due(after_pass=True) == due


@pytest.mark.parametrize("how", ["partial_fit", "warm_start", "fit"])
def test_scoring_in_another_thread_and_learning_do_not_disturb_each_other(how):
    rng = np.random.default_rng(0)
    known, new = rng.standard_normal((16, 4, 4, 6)), 9 + rng.standard_normal((16, 4, 4, 6))
    some = known[:6]
    made = vqad.VQFlowDetector(
        backbone=None, n_concepts=2, n_patterns=4, hidden=4, max_iter=1, false_alarm_rate=0.3, random_state=0
    )
    made.fit(known, category=["a"] * 16)
    before, seen, done = judged(made, some), [], threading.Event()
    alone = copy.deepcopy(made)

    def score():
        while not done.wait(0.02):  # threads that never rest would keep the interpreter from the one that learns
            seen.append(judged(made, some))

    def learn(detector):
        detector.set_params(max_iter=4, warm_start=how == "warm_start")
        images, kind = (known, "a") if how == "warm_start" else (new, "b")
        (detector.partial_fit if how == "partial_fit" else detector.fit)(images, category=[kind] * 16)

    beside = threading.Thread(target=score)
    beside.start()
    try:
        learn(made)
    finally:
        done.set()
        beside.join()
    learn(alone)
    after = judged(alone, some)
    assert np.array_equal(after[0], before[0]) == (how == "partial_fit")
    for found, expected in zip(judged(made, some), after, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert len(seen) > 1
    for each in seen:
        for found, one, other in zip(each, before, after, strict=True):
            assert np.array_equal(found, one) or np.array_equal(found, other)


def judged(detector, X):
    return detector.score_samples(X), detector.anomaly_map(X), detector.predict_category(X), detector.predict_concept(X)


def test_what_a_caller_sets_while_a_fit_runs_stays(monkeypatch):
    made = small().fit(MAPS)
    old, draw = made.offset_, made._draw_seed

    def and_set():
        made.set_params(n_jobs=3).note = "mine"
        return draw()

    monkeypatch.setattr(HVQTransDetector, "_draw_seed", lambda self: and_set())
    made.fit(MAPS[:40] + 1)
    assert made.n_jobs == 3
    assert made.note == "mine"
    assert made.offset_ != old


def test_what_is_wrong_with_labels_is_said_before_features_are_extracted(plain, monkeypatch):
    monkeypatch.setattr("vqad.source.FeatureStore", None)
    per_category, with_one = {"threshold": "category"}, ["d", *NAMES[1:]]
    for parameters, call, more, message in (
        ({}, "partial_fit", {"category": KIND}, "has labels such as 0, but the detector knows 'a'"),
        ({"warm_start": True}, "fit", {"category": ["a"] * 60}, "needs images of all categories"),
        ({"warm_start": True, **per_category}, "fit", {"category": [*"ab" * 29, "b", "c"]}, "needs .*; c has 1"),
        (per_category, "fit", {"category": with_one}, "needs at least 2 images .* d has 1"),
        (per_category, "partial_fit", {"category": ["e", "e", *with_one[:58]]}, "needs at least 2 images .* d has 1"),
        (
            per_category,
            "fit",
            {"groups": [0, 1, 2] * 19 + [0, 1, 3], "category": NAMES},
            "at least 2 groups .* a has 1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            getattr(copy_of(plain, **parameters), call)(MAPS, **more)


@pytest.mark.parametrize(("X", "error"), [(MAPS[:1], ValueError), (MAPS[:, :2], ZeroDivisionError)])
def test_a_fit_that_fails_leaves_what_was_fitted(plain, monkeypatch, X, error):
    made, fresh = copy_of(plain), small()
    monkeypatch.setattr("vqad.fitting.add_prototypes", lambda *args: 1 / 0)  # the last step
    for detector in (made, fresh):
        with pytest.raises(error):
            detector.fit(X)
    np.testing.assert_array_equal(made.score_samples(MAPS), plain.score_samples(MAPS))
    assert made.fitted_ is plain.fitted_
    with pytest.raises(NotFittedError):
        fresh.predict(MAPS)
    assert vars(fresh).keys() == vars(small()).keys()
