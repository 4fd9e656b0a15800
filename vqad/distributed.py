"""Many machines: `BatchScorer`, for ray.data, dask.bag and Spark, and `learning_together`, for torchrun."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from vqad.collective import Crew, learning_together
from vqad.engine import at_most_threads
from vqad.images import ImageSequence
from vqad.persistence import load, read_checksum
from vqad.verdicts import verdicts_of
from vqad.workers import judge_readable, opened

__all__ = ["COLUMNS", "BatchScorer", "Crew", "learning_together"]

COLUMNS = ("path", "category", "anomaly_score", "threshold", "p_value", "label", "error")


class BatchScorer:
    """Scores batches of image files with a saved model, for engines that provide the batches.

    A pickle of it holds only the name of the file. Each process opens the model when it first scores, and keeps it.

    Parameters
    ----------
    model : path-like
        File written by `vqad.save` or ``vqad fit``, which every worker can read under this name.
    column : str, default="path"
        Column of the paths in batches with several columns.
    device : "auto", str or torch.device, default="auto"
        Device of each worker; "auto" uses CUDA if there is a GPU.
    n_threads : int, default=1
        Number of computing threads on a CPU.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        When there is no such file.
    ValueError
        When it is not a model; on a worker, when the file under this name has changed.

    Notes
    -----
    Each image yields one row, in the order of the batch: its path, ``category``, ``anomaly_score`` (higher is more
    anomalous), ``threshold``, ``p_value``, ``label`` (+1 normal, -1 anomaly) and ``error``. An image that cannot be
    read does not stop the job: it gets NaN for numbers, an empty category, the label 0, and the reason in ``error``.

    Examples
    --------
    >>> import ray, dask.bag                                                                       # doctest: +SKIP
    >>> scorer = BatchScorer("model.safetensors")                                                  # doctest: +SKIP
    >>> ray.data.from_items([{"path": p} for p in paths]).map_batches(scorer, batch_size=64)       # doctest: +SKIP
    >>> dask.bag.from_sequence(paths, partition_size=64).map_partitions(scorer.rows)               # doctest: +SKIP
    >>> spark.createDataFrame([(p,) for p in paths], "path string").mapInPandas(                   # doctest: +SKIP
    ...     scorer.frames, scorer.schema)
    """

    def __init__(
        self, model: str | os.PathLike[str], *, column: str = "path", device: Any = "auto", n_threads: int = 1
    ) -> None:
        self.model, self.column = os.path.abspath(os.fspath(model)), column
        self.device, self.n_threads = device, n_threads
        self.checksum = read_checksum(self.model)

    def __call__(self, batch: Any) -> Any:
        """Score a batch, a mapping of columns or a DataFrame; returns it with the columns of `COLUMNS` added."""
        found = self._table([os.fspath(path) for path in batch[self.column]])
        del found["path"]
        if hasattr(batch, "assign"):
            return batch.assign(**found)
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"a batch must be a mapping of columns or a DataFrame with a column {self.column!r}; got "
                f"{type(batch).__name__}. For a list of paths use scorer.rows."
            )
        return {**batch, **found}

    def rows(self, paths: Iterable[str | os.PathLike[str]]) -> list[dict[str, Any]]:
        """Score paths; returns one mapping per image, for `dask.bag.Bag.map_partitions`."""
        table = self._table([os.fspath(path) for path in paths])
        return [dict(zip(table, row)) for row in zip(*(column.tolist() for column in table.values()))]

    def frames(self, frames: Iterable[Any]) -> Iterator[Any]:
        """Score DataFrames with a column of paths; yields DataFrames of `schema`, for Spark's `mapInPandas`."""
        for frame in frames:
            yield type(frame)(self._table([os.fspath(path) for path in frame[self.column]]))

    @property
    def schema(self) -> str:
        """Schema of `frames`, for Spark."""
        kinds = ("string", "string", "double", "double", "double", "int", "string")
        return ", ".join(f"{name} {kind}" for name, kind in zip(COLUMNS, kinds))

    def _table(self, paths: list[str]) -> dict[str, np.ndarray]:
        detector = opened(hashlib.sha256(f"{self.checksum} {self.device}".encode()).hexdigest(), self._open)
        n = len(paths)
        strings = {name: np.full(n, "", dtype=object) for name in ("category", "error")}
        numbers = {name: np.full(n, np.nan) for name in ("anomaly_score", "threshold", "p_value")}
        table = {"path": np.array(paths, dtype=object), **strings, **numbers, "label": np.zeros(n, np.int32)}
        if not n:
            return table
        images = ImageSequence([os.path.abspath(path) for path in paths], np.arange(n))
        with at_most_threads(self.n_threads):
            rows, judged, errors = judge_readable(detector.scorer_, detector.map_source(images), keep_maps=False)
        for row, error in errors.items():
            table["error"][row] = error.partition(" of X, ")[2]
        if judged is not None:
            verdicts = verdicts_of(detector.fitted_, judged)
            names = {"anomaly_score": "score", "threshold": "threshold", "p_value": "p_value", "label": "label"}
            for column, name in names.items():
                table[column][rows] = getattr(verdicts, name)
            table["category"][rows] = verdicts.category.astype(str)
        return {name: table[name] for name in COLUMNS}

    def _open(self) -> Any:
        if read_checksum(self.model) != self.checksum:
            raise ValueError(
                f"model {self.model!r} has changed since this job began: save different models under different names."
            )
        return load(self.model).set_params(device=self.device, n_jobs=1)
