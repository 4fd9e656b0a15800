"""The training loop of all models: schedule, progress, early stopping, checkpoints."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from vqad import collective
from vqad._warn import warn
from vqad.collective import AnyCheckpoint
from vqad.engine import ahead, lent, on_device
from vqad.nn.draws import drawing
from vqad.nn.quantize import VectorQuantizer
from vqad.nn.ranks import summed
from vqad.training_run import Run, TrainingLog, TrainingPlan

logger = logging.getLogger("vqad")

REVIVE_EVERY = 16
"""Steps between two searches for unused codes."""

Features = Tensor | Sequence[Tensor]


class Trainable(Protocol):
    """What a model needs besides being an ``nn.Module``."""

    def loss(self, features: Features, category: Tensor) -> Tensor:
        """Scalar training loss of a batch."""


class FeatureSource(Protocol):
    """Features by index, wherever they are stored."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int] | Tensor) -> Features:
        """Features of some images, float, on the host or already on the device."""


class Trainer:
    """Trains one model on cached features.

    Parameters
    ----------
    model : nn.Module
        With the methods of `Trainable`.
    source : FeatureSource
    category : Tensor of shape (n,), int64
        Category number of each image of ``source``.
    plan : TrainingPlan
    device, dtype : torch.device, torch.dtype
        Device and type to compute in; a ``dtype`` other than float32 enables autocast.
    parts : sequence of nn.Module, optional
        The parts of the model to train; all if left out. The others keep every bit.
    """

    def __init__(
        self,
        model: nn.Module,
        source: FeatureSource,
        category: Tensor,
        plan: TrainingPlan,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        parts: Sequence[nn.Module] | None = None,
    ) -> None:
        self.model = model
        self.source = source
        self.category = category
        self.plan = plan
        self.device = device
        self.dtype = dtype
        self.parts = [model] if parts is None else list(parts)
        self.batch_size = plan.batch_size

    def fit(
        self, train: Tensor, validation: Tensor | None = None, checkpoint: AnyCheckpoint | None = None
    ) -> TrainingLog:
        """Train on the images ``train`` and monitor the loss on the images ``validation``.

        Parameters
        ----------
        train, validation : Tensor of int64
        checkpoint : Checkpoint, optional
            Where to write checkpoints, and to resume from if it holds a state.

        Returns
        -------
        log : TrainingLog

        Raises
        ------
        KeyboardInterrupt
            When interrupted in the first pass. Later the training just ends early.
        """
        plan, started = self.plan, time.monotonic()
        with lent(self.model, self.device), _frozen(self.model, self.parts), collective.adding_up():
            n_steps = plan.max_iter * math.ceil(len(train) / plan.batch_size)
            run = Run(self.model, plan, n_steps, self.device)
            try:
                if checkpoint is not None and checkpoint.state is not None:
                    self.batch_size = run.restore(checkpoint.state, plan.batch_size)
                    logger.info("resuming after %d of %d passes", run.log.n_iter, plan.max_iter)
                if checkpoint is None or not checkpoint.finished:
                    self._run(run, train, validation, checkpoint)
            except KeyboardInterrupt:
                if not run.log.n_iter:
                    raise
                run.log.interrupted = True
                warn(
                    f"Training was interrupted after {run.log.n_iter} of {plan.max_iter} passes; "
                    "what was learned so far is kept."
                )
            finally:
                self.model.eval()
                for codebook in codebooks(self.model):
                    codebook.forget()
            run.best.restore(self.model)
        run.log.seconds += time.monotonic() - started
        return run.log

    def _run(self, run: Run, train: Tensor, validation: Tensor | None, checkpoint: AnyCheckpoint | None) -> None:
        plan, log = self.plan, run.log
        bar = tqdm(total=plan.max_iter, initial=log.n_iter, desc="training", unit="pass", disable=not plan.verbose)
        with bar:
            while log.n_iter < plan.max_iter and not run.best.exhausted:
                log.loss_curve.append(self._one_pass(run, train, checkpoint))
                log.perplexity.append(codebook_perplexity(self.model))
                shown = {"loss": f"{log.loss_curve[-1]:.4f}", "codes": f"{log.perplexity[-1]:.0f}"}
                if validation is not None:
                    log.validation_curve.append(self.evaluate(validation))
                    shown["validation"] = f"{log.validation_curve[-1]:.4f}"
                bar.set_postfix(shown)
                bar.update()
                logger.info("pass %d/%d: %s", log.n_iter, plan.max_iter, shown)
                if not math.isfinite(log.loss_curve[-1]):
                    raise ValueError(
                        f"The training loss became {log.loss_curve[-1]} in pass {log.n_iter}. Lower learning_rate "
                        f"(now {plan.learning_rate}), or use precision='float32'."
                    )
                if validation is not None:
                    run.best.look_at(log.validation_curve[-1], self.model)
                if checkpoint is not None and checkpoint.due(after_pass=True):
                    checkpoint.write(run.state(self.batch_size))

    def _one_pass(self, run: Run, train: Tensor, checkpoint: AnyCheckpoint | None) -> float:
        """Train for one pass, or for the rest of a pass that was interrupted by a kill."""
        self._set_training_mode()
        if run.order is None:
            with drawing():
                run.start_pass(train, self.category)
        order = cast(Tensor, run.order)
        parts = collective.batches(order[run.n_done :], self.plan.batch_size)
        own, read = [collective.own(indices) for indices in parts], collective.reader(self.source)
        for indices, mine, features in zip(parts, own, ahead(read, own, self.device)):
            run.optimizer.zero_grad(set_to_none=True)
            with nullcontext() if getattr(self.model, "draws_apart", False) else drawing():
                loss = self._backward(features, self.category[mine], len(indices))
            run.total += summed(loss) * len(indices)
            collective.sum_gradients(self.model)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.clip_norm)
            run.optimizer.step()
            run.schedule.step()
            revive = run.schedule.last_epoch % REVIVE_EVERY == 0
            with drawing() if revive else nullcontext():
                for codebook in codebooks(self.model):
                    codebook.step(revive)
            run.n_done += len(indices)
            if checkpoint is not None and run.n_done < len(order) and checkpoint.due(after_pass=False):
                checkpoint.write(run.state(self.batch_size))
        run.order = None
        return float(run.total) / len(train)

    def _set_training_mode(self) -> None:
        self.model.eval()
        for part in self.parts:
            part.train()

    def _backward(self, features: Features, category: Tensor, n: int) -> Tensor:
        """Add the gradient of the mean loss of ``n`` images, of which this process has some; returns its share.

        If the device runs out of memory, the images are processed in parts.
        """
        while True:
            before = self._running_statistics()
            try:
                total = torch.zeros((), device=self.device)
                for start in range(0, len(category), self.batch_size):
                    part = slice(start, start + self.batch_size)
                    loss = self._loss(_images(features, part), category[part])
                    loss = loss * (len(category[part]) / n)
                    loss.backward()  # type: ignore[no-untyped-call]
                    total += loss.detach()
                fits = True
            except torch.cuda.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                fits = False
            if collective.all_of(fits) if self._may_run_out() else fits:
                return total
            self._halve_batch()
            self.model.zero_grad(set_to_none=True)
            for buffer, value in before:  # undo the updates by parts that did fit into memory
                buffer.copy_(value)
            for codebook in codebooks(self.model):
                codebook.forget()

    def _running_statistics(self) -> list[tuple[Tensor, Tensor]]:
        """Buffers that a forward pass updates, with copies, if it may run out of memory."""
        if not self._may_run_out():
            return []
        norms = [m for part in self.parts for m in part.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        return [(b, b.clone()) for norm in norms for b in norm.buffers()]

    def _may_run_out(self) -> bool:
        return self.device.type != "cpu"

    def _halve_batch(self) -> None:
        self.batch_size = max(1, self.batch_size // 2)
        warn(f"Out of device memory: continuing with batches of {self.batch_size} images.")

    def _loss(self, features: Features, category: Tensor) -> Tensor:
        """Loss of a batch; the category stays on the host, so that reading it is cheap."""
        features = on_device(features, self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = cast(Trainable, self.model).loss(features, category)
        return loss

    @torch.inference_mode()
    def evaluate(self, indices: Tensor) -> float:
        """Mean loss of some images in evaluation mode."""
        self.model.eval()
        try:
            total, read = torch.zeros((), dtype=torch.float64), collective.reader(self.source)
            for part in torch.split(collective.own(indices), self.batch_size):
                if len(part):
                    total += float(self._loss(read(part), self.category[part])) * len(part)
            return float(summed(total)) / len(indices)
        except torch.cuda.OutOfMemoryError:
            if self.batch_size == 1:
                raise
        finally:
            self._set_training_mode()
        self._halve_batch()
        return self.evaluate(indices)


def codebooks(model: nn.Module) -> list[VectorQuantizer]:
    """All codebooks of a model."""
    return [m for m in model.modules() if isinstance(m, VectorQuantizer)]


def codebook_perplexity(model: nn.Module) -> float:
    """Effective number of codes in use, averaged over all codebooks of a model."""
    books = [codebook.perplexity().flatten() for codebook in codebooks(model)]
    return float(torch.cat(books).mean()) if books else float("nan")


def _images(features: Features, part: slice) -> Features:
    return features[part] if isinstance(features, Tensor) else [f[part] for f in features]


@contextmanager
def _frozen(model: nn.Module, parts: Sequence[nn.Module]) -> Iterator[None]:
    """Freeze all parameters except those of ``parts``."""
    learning = {id(p) for part in parts for p in part.parameters() if p.requires_grad}
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(id(p) in learning)
        yield
    finally:
        for p, required in before:
            p.requires_grad_(required)
