"""Judging on workers of joblib's backends, and what other engines map over batches of files."""

import os
import pickle
import signal
import sys
import warnings
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import joblib
import numpy as np
import pytest
from conftest import save_png
from PIL import Image

import vqad.workers
from vqad import HVQTransDetector, load, save
from vqad.datasets import make_textured_parts
from vqad.distributed import COLUMNS, BatchScorer
from vqad.workers import jobs_elsewhere, map_in_order

N_WORKERS = 2


@pytest.fixture(scope="module")
def detector():
    """On 64 pixels, with a small backbone of random weights."""
    parts = make_textured_parts(24, 0, categories=("disc",), image_size=64, random_state=0)
    made = HVQTransDetector(
        backbone="test_efficientnet", weights="random", image_size=64, max_iter=1, d_model=16, n_codes=8,
        false_alarm_rate=0.3, random_state=0,
    )  # fmt: skip
    return made.fit(parts.images)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    parts = make_textured_parts(30, 10, categories=("disc",), image_size=48, random_state=1)
    folder = tmp_path_factory.mktemp("worked")
    for k, pixels in enumerate(parts.images):
        save_png(folder / f"{k:02d}.png", pixels)
    return sorted(map(str, folder.glob("*.png")))


@pytest.fixture(scope="module")
def model(detector, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save(detector, path)
    return path


@pytest.fixture(scope="module")
def dask_client():
    distributed = pytest.importorskip("distributed", reason="the engine dask is not installed")
    with distributed.Client(n_workers=N_WORKERS, threads_per_worker=1, dashboard_address=None) as client:
        yield client


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray", reason="the engine ray is not installed")
    from ray.util.joblib import register_ray

    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - else they stand back behind all else here
    ray.init(num_cpus=N_WORKERS, include_dashboard=False, log_to_driver=False)
    register_ray()
    yield ray
    ray.shutdown()


@pytest.fixture
def engine(request):
    """joblib's own processes, or an engine that needs a cluster."""
    if request.param != "loky":
        request.getfixturevalue({"dask": "dask_client", "ray": "ray"}[request.param])
    return {"backend": request.param, "n_jobs": N_WORKERS}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("dask", "ray")]
on_engines = pytest.mark.parametrize("engine", ["loky", *SLOW], indirect=True)


@pytest.fixture
def seen(monkeypatch):
    """What tasks gave back."""
    kept = []

    def noted(*args):
        for done in map_in_order(*args):
            kept.append(done)
            yield done

    monkeypatch.setattr(vqad.workers, "map_in_order", noted)
    return kept


@on_engines
def test_workers_say_what_one_process_says(engine, detector, paths, seen):
    verdicts, maps = detector.judge(paths, keep_maps=False), detector.anomaly_map(paths)
    with joblib.parallel_config(**engine):
        np.testing.assert_array_equal(detector.anomaly_map(paths), maps)
        first = len(seen)
        found = detector.judge(paths, keep_maps=False)
    assert 1 < first < len(seen)
    assert not any(done.worker.endswith(f" {os.getpid()}") for done in seen)
    for name in ("score", "p_value", "label", "category", "threshold"):
        np.testing.assert_array_equal(getattr(found, name), getattr(verdicts, name))
    opened = {done.worker: done.n_opened for done in seen}
    assert max(opened.values()) == 1, opened


@pytest.mark.slow
@on_engines
def test_of_a_worker_that_dies_nothing_is_lost(engine, detector, paths, monkeypatch):
    scores, done, names = detector.score_samples(paths), [], paths * 8

    def and_kill(*args):
        for each in map_in_order(*args):
            if not done:
                os.kill(int(each.worker.split()[-1]), signal.SIGKILL)
            done.append(each)
            yield each

    monkeypatch.setattr(vqad.workers, "map_in_order", and_kill)
    with joblib.parallel_config(**engine), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = detector.score_samples(names)
    np.testing.assert_array_equal(found, np.tile(scores, 8))
    assert len(done) == len(names) // 32
    if engine["backend"] == "loky":  # others may mend it by themselves
        assert any("A worker was lost" in str(each.message) for each in said)


def test_workers_that_die_over_and_over_end_the_work(monkeypatch):
    tried = []

    def run(work, parts, n_jobs):
        tried.append(list(parts))
        raise BrokenProcessPool("dead")
        yield

    monkeypatch.setattr(vqad.workers, "_run", run)
    with pytest.warns(UserWarning, match="BrokenProcessPool"), pytest.raises(BrokenProcessPool):
        list(map_in_order(abs, range(3), 2))
    assert tried == [[0, 1, 2]] * 3


def test_an_image_that_cannot_be_read_is_named_as_in_one_process(detector, paths, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(paths[0]).read_bytes()[:60])
    names = [*paths[:20], str(broken), *paths[20:]]
    with (
        joblib.parallel_config(backend="loky", n_jobs=2),
        pytest.raises(ValueError, match=r"image 20 of X, path .*broken"),
    ):
        detector.predict(names)


def test_what_is_said_of_many_images_is_said_once(detector, paths, tmp_path):
    alpha = np.dstack([np.full((40, 40, 3), 90, np.uint8), np.full((40, 40), 255, np.uint8)])
    for k in range(40):
        Image.fromarray(alpha).save(tmp_path / f"{k:02d}.png")
    names = sorted(map(str, tmp_path.glob("*.png")))
    with joblib.parallel_config(backend="loky", n_jobs=2), pytest.warns(UserWarning, match="alpha") as said:
        detector.score_samples(names)
    assert len(said) == 1
    assert "image 0 of X" in str(said[0].message)


def test_where_work_is_done():
    assert jobs_elsewhere(None) == jobs_elsewhere(4) == 0
    with joblib.parallel_config(backend="loky", n_jobs=3):
        assert (jobs_elsewhere(None), jobs_elsewhere(2), jobs_elsewhere(1)) == (3, 2, 0)
    with joblib.parallel_config(backend="threading", n_jobs=3):
        assert jobs_elsewhere(None) == 0
    with joblib.parallel_config(n_jobs=3):
        assert jobs_elsewhere(None) == 0


def test_few_images_stay_here(detector, paths, seen):
    with joblib.parallel_config(backend="loky", n_jobs=2):
        detector.score_samples(paths[:8])
    assert not seen


def test_the_model_does_not_travel_with_a_task(detector, paths):
    source = detector.map_source(paths)
    work = vqad.workers.JudgeTask(detector.scorer_, source, False, ("cpu", "auto"))
    task, content = work.sent_by(None)
    assert content.nbytes > 300_000
    assert len(pickle.dumps((task, source.data.part(range(32))))) < 10_000
    again = vqad.workers.JudgeTask(detector.scorer_, source, False, ("cpu", "auto"))
    assert again.sent_by(None)[1] is content


# ---- batches of other engines ----------------------------------------------------------------------


@pytest.fixture
def batch(paths, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    return [*paths[:3], str(tmp_path / "broken.png"), str(tmp_path / "none.png"), *paths[3:5]]


@pytest.fixture
def expected(detector, paths):
    return -detector.score_samples(paths[:5])


def is_expected(rows, batch, expected):
    """Whether rows, mappings in the order of the batch, are what the detector says."""
    assert [row["path"] for row in rows] == batch
    read = [row for row in rows if not row["error"]]
    assert [row["path"] for row in rows if row["error"]] == batch[3:5]
    assert all(
        np.isnan(np.float64(row["anomaly_score"])) and row["label"] == 0 and not row["category"] for row in rows[3:5]
    )
    np.testing.assert_array_equal([row["anomaly_score"] for row in read], expected)
    assert [row["label"] for row in read] == [-1 if row["anomaly_score"] > row["threshold"] else 1 for row in read]
    assert all(0 < row["p_value"] <= 1 for row in read)
    return True


def test_a_batch_of_columns_keeps_its_own(model, batch, expected):
    scorer = pickle.loads(pickle.dumps(BatchScorer(model, column="file")))
    found = scorer({"file": np.array(batch), "camera": np.arange(7)})
    assert list(found["camera"]) == list(range(7))
    rows = [dict(zip(COLUMNS, row)) for row in zip(found["file"], *(found[name] for name in COLUMNS[1:]))]
    assert is_expected(rows, batch, expected)
    assert len(pickle.dumps(scorer)) < 1000


def test_frames(model, batch, expected):
    pandas = pytest.importorskip("pandas")
    scorer = BatchScorer(model)
    (found,) = scorer.frames(iter([pandas.DataFrame({"path": batch})]))
    assert is_expected(found.to_dict("records"), batch, expected)
    assert list(found) == [each.split()[0] for each in scorer.schema.split(", ")]
    joined = scorer(pandas.DataFrame({"path": batch, "camera": 1}))
    assert list(joined)[:2] == ["path", "camera"]
    assert is_expected(joined.to_dict("records"), batch, expected)


def test_a_model_that_was_replaced_ends_the_job(model, batch, detector, tmp_path):
    path = tmp_path / "model.safetensors"
    save(detector, path)
    scorer = BatchScorer(path)
    save(load(path).recalibrate(false_alarm_rate=0.4), path)
    scorer.device = "cpu"  # not the one that this process has open
    with pytest.raises(ValueError, match="has changed since this job began: save different models"):
        scorer.rows(batch)


@pytest.mark.slow
def test_ray_data(ray, model, batch, expected):
    import ray.data

    data = ray.data.from_items([{"path": path} for path in batch])
    data = data.map_batches(
        BatchScorer, fn_constructor_args=(str(model),), compute=ray.data.ActorPoolStrategy(size=1), batch_size=4
    )
    assert is_expected(sorted(data.take_all(), key=lambda row: batch.index(row["path"])), batch, expected)


@pytest.mark.slow
def test_dask_bag(dask_client, model, batch, expected):
    bag = pytest.importorskip("dask.bag").from_sequence(batch, partition_size=4)
    assert is_expected(bag.map_partitions(BatchScorer(model).rows).compute(), batch, expected)


@pytest.mark.slow
def test_spark(model, batch, expected, monkeypatch):
    sql = pytest.importorskip("pyspark.sql", reason="the engine Spark is not installed")
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    spark = sql.SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
    try:
        scorer = BatchScorer(model)
        frame = spark.createDataFrame([(path,) for path in batch], "path string").coalesce(1)
        rows = [row.asDict() for row in frame.mapInPandas(scorer.frames, scorer.schema).collect()]
    finally:
        spark.stop()
    assert is_expected(rows, batch, expected)
