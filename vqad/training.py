"""The one training loop: schedule, progress, early stopping, going on after a kill."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from vqad import collective
from vqad._warn import warn
from vqad.collective import AnyCheckpoint
from vqad.engine import ahead, lent, on_device
from vqad.nn.draws import drawing, random_state, set_random_state
from vqad.nn.quantize import VectorQuantizer
from vqad.nn.ranks import summed

logger = logging.getLogger("vqad")

REVIVE_EVERY = 16
"""Steps between two looks for codes that are not used."""

Features = Tensor | Sequence[Tensor]


class Trainable(Protocol):
    """What the loop asks of a model beyond being an ``nn.Module``."""

    def loss(self, features: Features, category: Tensor) -> Tensor:
        """Scalar training loss of a batch."""


class FeatureSource(Protocol):
    """Features by index, wherever they are kept."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int] | Tensor) -> Features:
        """Features of some images, float, on the host or already on the device."""

    def own_batch(self, indices: Sequence[int] | Tensor) -> Features:
        """The same of images that this process has, where several learn together."""


@dataclass(frozen=True)
class TrainingPlan:
    """How to train. Names follow scikit-learn's ``MLPClassifier`` where it has one.

    Attributes
    ----------
    max_iter : int
        Passes over the training images.
    schedule : {"cosine", "constant", "step"}
        "cosine": linear warm-up over the first twentieth of the steps, then half a cosine down to zero.
        "constant": linear warm-up from a tenth over the first twelfth (VQ-Flow: 5 epochs of 60), then constant.
        "step": constant, times 0.1 at 80 % of the steps (HVQ-Trans: epoch 800 of 1000).
    clip_norm : float
        Gradients are scaled down to this norm; infinity leaves them alone.
    category_balance : float in [0, 1]
        How far a pass makes up for categories of different sizes, see `one_pass`.
    """

    max_iter: int = 50
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    clip_norm: float = 0.1
    schedule: str = "cosine"
    early_stopping: bool = False
    n_iter_no_change: int = 10
    tol: float = 1e-4
    verbose: int = 0
    category_balance: float = 0.0

    def rate(self, step: int, n_steps: int) -> float:
        """Factor on the learning rate at ``step`` of ``n_steps``."""
        if self.schedule == "step":
            return 1.0 if step < 0.8 * n_steps else 0.1
        if self.schedule == "constant":
            return min(1.0, 0.1 + 0.9 * step / max(1, n_steps // 12))
        warm_up = max(1, n_steps // 20)
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, n_steps - warm_up)))


@dataclass
class TrainingLog:
    """What happened.

    Attributes
    ----------
    loss_curve : list of float
        Mean training loss of every pass.
    validation_curve : list of float
        Loss of the validation images after every pass; empty without early stopping.
    perplexity : list of float
        Mean number of codes in effective use after every pass.
    interrupted : bool
        Whether Ctrl-C ended the training. All is as it was after the last finished step.
    """

    loss_curve: list[float] = field(default_factory=list)
    validation_curve: list[float] = field(default_factory=list)
    perplexity: list[float] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def n_iter(self) -> int:
        return len(self.loss_curve)


class Trainer:
    """Trains one model on cached features.

    Parameters
    ----------
    model : nn.Module
        With the methods of `Trainable`.
    source : FeatureSource
    category : Tensor of shape (n,), int64
        Category number of every image of ``source``.
    plan : TrainingPlan
    device, dtype : torch.device, torch.dtype
        Where to work; a ``dtype`` other than float32 turns autocast on.
    parts : sequence of nn.Module, optional
        The parts of the model that learn, all when left out. The others keep every bit.
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
        """Train on the images ``train``, watch the loss on the images ``validation``.

        Parameters
        ----------
        train, validation : Tensor of int64
        checkpoint : Checkpoint, optional
            Where the training is kept, and gone on from if it holds one.

        Returns
        -------
        log : TrainingLog

        Raises
        ------
        KeyboardInterrupt
            In the first pass; later ones are left with what was learned.
        """
        plan, started = self.plan, time.monotonic()
        with lent(self.model, self.device), _frozen(self.model, self.parts), collective.adding_up():
            n_steps = plan.max_iter * math.ceil(len(train) / plan.batch_size)
            run = _Run(self.model, plan, n_steps, self.device)
            try:
                if checkpoint is not None and checkpoint.state is not None:
                    self.batch_size = run.restore(checkpoint.state, plan.batch_size)
                    logger.info("going on after %d of %d passes", run.log.n_iter, plan.max_iter)
                if checkpoint is None or not checkpoint.finished:
                    self._run(run, train, validation, checkpoint)
            except KeyboardInterrupt:
                if not run.log.n_iter:
                    raise
                run.log.interrupted = True
                warn(
                    f"Training was interrupted after {run.log.n_iter} of {plan.max_iter} passes; "
                    "the model keeps what it has learned so far."
                )
            finally:
                self.model.eval()
                for codebook in codebooks(self.model):
                    codebook.forget()
            run.best.restore(self.model)
        run.log.seconds += time.monotonic() - started
        return run.log

    def _run(self, run: _Run, train: Tensor, validation: Tensor | None, checkpoint: AnyCheckpoint | None) -> None:
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

    def _one_pass(self, run: _Run, train: Tensor, checkpoint: AnyCheckpoint | None) -> float:
        """Train on every image once, or on those that are left of a pass that a kill cut short."""
        self._set_training_mode()
        if run.order is None:
            with drawing():
                run.start_pass(train, self.category)
        order = cast(Tensor, run.order)
        parts = self._batches(order[run.n_done :])
        own = [self._own(indices) for indices in parts]
        for indices, mine, features in zip(parts, own, ahead(self._read, own, self.device)):
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

    def _batches(self, order: Tensor) -> Sequence[Tensor]:
        crew, size = collective.crew(), self.plan.batch_size
        return torch.split(order, size) if crew is None else collective.batches_of_all(order, size, crew)

    def _own(self, indices: Tensor) -> Tensor:
        """What this process has of some images."""
        crew = collective.crew()
        return indices if crew is None else crew.own(indices)

    def _read(self, indices: Tensor) -> Features:
        """Features of images that this process has."""
        return self.source.batch(indices) if collective.crew() is None else self.source.own_batch(indices)

    def _set_training_mode(self) -> None:
        self.model.eval()
        for part in self.parts:
            part.train()

    def _backward(self, features: Features, category: Tensor, n: int) -> Tensor:
        """Add the gradient of the mean loss of ``n`` images, of which this process has these; gives their part of it.

        They go in parts where the device's memory does not hold them at once.
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
            if self._do_all(fits):
                return total
            self._halve_batch()
            self.model.zero_grad(set_to_none=True)
            for buffer, value in before:  # what the parts that did fit have moved them by
                buffer.copy_(value)
            for codebook in codebooks(self.model):
                codebook.forget()

    def _running_statistics(self) -> list[tuple[Tensor, Tensor]]:
        """Buffers that a forward pass moves, and copies of them where a pass may fail for lack of memory."""
        if not self._may_run_out():
            return []
        norms = [m for part in self.parts for m in part.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        return [(b, b.clone()) for norm in norms for b in norm.buffers()]

    def _do_all(self, fits: bool) -> bool:
        """Whether this process, and all that learn with it, had enough memory."""
        if collective.crew() is None or not self._may_run_out():
            return fits
        return not summed(torch.tensor([float(not fits)])).item()

    def _may_run_out(self) -> bool:
        return self.device.type != "cpu"

    def _halve_batch(self) -> None:
        self.batch_size = max(1, self.batch_size // 2)
        warn(f"Out of device memory: going on with batches of {self.batch_size} images.")

    def _loss(self, features: Features, category: Tensor) -> Tensor:
        """Loss of a batch; the category stays on the host, where it is read."""
        features = on_device(features, self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = cast(Trainable, self.model).loss(features, category)
        return loss

    @torch.inference_mode()
    def evaluate(self, indices: Tensor) -> float:
        """Mean loss of some images in evaluation mode."""
        self.model.eval()
        try:
            total, own = torch.zeros((), dtype=torch.float64), self._own(indices)
            for part in torch.split(own, self.batch_size) if len(own) else ():
                total += float(self._loss(self._read(part), self.category[part])) * len(part)
            return float(summed(total)) / len(indices)
        except torch.cuda.OutOfMemoryError:
            if self.batch_size == 1:
                raise
        finally:
            self._set_training_mode()
        self._halve_batch()
        return self.evaluate(indices)


def one_pass(category: Tensor, balance: float) -> Tensor:
    r"""Random order of a pass: n places in a list of n images, in which small categories may come more often.

    Of :math:`n` draws a category of :math:`n_c` images gets a share in proportion to :math:`n_c^{1 - b}`, and at least
    one: with a balance b of 0 each image is drawn once, with 1 each category equally often. Within a category no image
    is drawn twice more than another.

    Parameters
    ----------
    category : Tensor of shape (n,), int64
    balance : float in [0, 1]
    """
    n = len(category)
    if not balance:
        return torch.randperm(n)
    kinds, sizes = torch.unique(category.cpu(), return_counts=True)
    shares = sizes.double().pow(1 - balance)
    bounds = (shares.cumsum(0) / shares.sum() * (n - len(kinds))).round().long()
    counts = 1 + torch.diff(bounds, prepend=bounds.new_zeros(1))
    drawn = []
    for kind, count in zip(kinds, counts.tolist()):
        own = (category == kind).nonzero().squeeze(1)
        rounds = [own[torch.randperm(len(own))] for _ in range(-(-count // len(own)))]
        drawn.append(torch.cat(rounds)[:count])
    return torch.cat(drawn)[torch.randperm(n)]


def codebooks(model: nn.Module) -> list[VectorQuantizer]:
    """All codebooks of a model."""
    return [m for m in model.modules() if isinstance(m, VectorQuantizer)]


def codebook_perplexity(model: nn.Module) -> float:
    """Effective number of codes in use, the mean over all codebooks of a model."""
    books = [codebook.perplexity().flatten() for codebook in codebooks(model)]
    return float(torch.cat(books).mean()) if books else float("nan")


def _images(features: Features, part: slice) -> Features:
    return features[part] if isinstance(features, Tensor) else [f[part] for f in features]


@contextmanager
def _frozen(model: nn.Module, parts: Sequence[nn.Module]) -> Iterator[None]:
    """Let no parameter learn but those of ``parts``."""
    learning = {id(p) for part in parts for p in part.parameters() if p.requires_grad}
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(id(p) in learning)
        yield
    finally:
        for p, required in before:
            p.requires_grad_(required)


class _Best:
    """The best state seen, and how long ago that was."""

    def __init__(self, tol: float, patience: int) -> None:
        self.tol = tol
        self.patience = patience
        self.loss = math.inf
        self.waited = 0
        self.state: dict[str, Tensor] | None = None

    @property
    def exhausted(self) -> bool:
        return self.waited >= self.patience

    def look_at(self, loss: float, model: nn.Module) -> None:
        self.waited = 0 if loss < self.loss - self.tol else self.waited + 1
        if loss < self.loss:
            self.loss = loss
            self.state = {k: v.detach().clone() for k, v in model.state_dict().items()}

    def restore(self, model: nn.Module) -> None:
        if self.state is not None:
            model.load_state_dict(self.state)


class _Run:
    """All that the rest of a training depends on, beside the images."""

    def __init__(self, model: nn.Module, plan: TrainingPlan, n_steps: int, device: torch.device) -> None:
        self.model = model
        self.plan = plan
        self.device = device
        learning = [p for p in model.parameters() if p.requires_grad]
        fused = device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(learning, lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=fused)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: plan.rate(step, n_steps))
        self.best = _Best(plan.tol, plan.n_iter_no_change)
        self.log = TrainingLog()
        self.order: Tensor | None = None
        self.n_done = 0
        self.total = torch.zeros((), device=device)

    def start_pass(self, train: Tensor, category: Tensor) -> None:
        crew, order = collective.crew(), one_pass(category[train], self.plan.category_balance)
        self.order = train[order] if crew is None else collective.in_turns(train[collective.agreed(order)], crew)
        self.n_done = 0
        self.total = torch.zeros((), device=self.device)

    def state(self, batch_size: int) -> dict[str, Any]:
        """Plain values and tensors only, so that reading them back runs no code."""
        on_cuda = self.device.type == "cuda"
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "log": asdict(self.log),
            "best": {"loss": self.best.loss, "waited": self.best.waited, "state": self.best.state},
            "pass": {"order": self.order, "n_done": self.n_done, "total": self.total},
            "random": collective.of_all(random_state()),
            "random_cuda": torch.cuda.get_rng_state(self.device) if on_cuda else None,
            "batch_size": batch_size,
        }

    def restore(self, state: dict[str, Any], batch_size: int) -> int:
        """Go back to where a training was; gives its size of batches, of a finished one ``batch_size``."""
        self.model.load_state_dict(state["model"])
        self.log = TrainingLog(**state["log"])
        if state["finished"]:
            return batch_size
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        best, this_pass = state["best"], state["pass"]
        self.best.loss, self.best.waited, self.best.state = best["loss"], best["waited"], best["state"]
        self.order, self.n_done = this_pass["order"], this_pass["n_done"]
        self.total = this_pass["total"].to(self.device)
        crew, states = collective.crew(), state["random"]
        set_random_state(states[0 if crew is None else crew.rank])
        if state["random_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
        return int(state["batch_size"])
