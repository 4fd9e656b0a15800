"""One training as data: its plan, its log, and its complete state."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vqad import collective
from vqad.nn.draws import random_state, set_random_state


@dataclass(frozen=True)
class TrainingPlan:
    """How to train. Names follow scikit-learn's ``MLPClassifier`` where possible.

    Attributes
    ----------
    max_iter : int
        Passes over the training images.
    batch_size : int
        Images per step.
    learning_rate, weight_decay : float
        Peak learning rate and weight decay of AdamW.
    schedule : {"cosine", "constant", "step"}
        "cosine": linear warm-up over the first twentieth of the steps, then half a cosine down to zero.
        "constant": linear warm-up from a tenth over the first twelfth (VQ-Flow: 5 of 60 epochs), then constant.
        "step": constant, times 0.1 from 80 % of the steps (HVQ-Trans: epoch 800 of 1000).
    clip_norm : float
        Largest norm of the gradient; infinity does not clip.
    early_stopping : bool
        Whether to watch the validation loss.
    n_iter_no_change : int
        Passes without an improvement of ``tol`` before stopping early.
    tol : float
        Smallest improvement of the validation loss that counts.
    verbose : int
        Whether to show a progress bar.
    category_balance : float in [0, 1]
        How far a pass compensates for categories of different sizes, see `one_pass`.
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
        """Factor of the learning rate at ``step`` of ``n_steps``."""
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
    """Log of a training.

    Attributes
    ----------
    loss_curve : list of float
        Mean training loss of each pass.
    validation_curve : list of float
        Validation loss after each pass; empty without early stopping.
    perplexity : list of float
        Effective number of codes in use after each pass, averaged over codebooks.
    interrupted : bool
        Whether Ctrl-C ended the training. The model then has the state after the last completed step.
    seconds : float
        Duration of the training.
    """

    loss_curve: list[float] = field(default_factory=list)
    validation_curve: list[float] = field(default_factory=list)
    perplexity: list[float] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def n_iter(self) -> int:
        return len(self.loss_curve)


def one_pass(category: Tensor, balance: float) -> Tensor:
    r"""Random order of a pass: n draws from n images, where small categories may be drawn more often.

    A category of :math:`n_c` images gets a share of the draws proportional to :math:`n_c^{1 - b}`, and at least one:
    with a balance b of 0 each image is drawn once, with 1 all categories are drawn equally often. Within a category
    the numbers of draws of two images differ by at most one.

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


class Best:
    """The state with the lowest validation loss, and the number of passes since the last improvement."""

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


class Run:
    """Complete state of a training, except for the images."""

    def __init__(self, model: nn.Module, plan: TrainingPlan, n_steps: int, device: torch.device) -> None:
        self.model = model
        self.plan = plan
        self.device = device
        learning = [p for p in model.parameters() if p.requires_grad]
        fused = device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(learning, lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=fused)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: plan.rate(step, n_steps))
        self.best = Best(plan.tol, plan.n_iter_no_change)
        self.log = TrainingLog()
        self.order: Tensor | None = None
        self.n_done = 0
        self.total = torch.zeros((), device=device)

    def start_pass(self, train: Tensor, category: Tensor) -> None:
        self.order = collective.shuffled(train[one_pass(category[train], self.plan.category_balance)])
        self.n_done = 0
        self.total = torch.zeros((), device=self.device)

    def state(self, batch_size: int) -> dict[str, Any]:
        """The state as plain values and tensors, so that reading it runs no code."""
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
        """Restore a state; returns its batch size, or ``batch_size`` if the training was finished."""
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
        set_random_state(collective.mine(state["random"]))
        if state["random_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
        return int(state["batch_size"])
