"""One model learned by two processes is what one process learns."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vqad.collective import Crew, batches_of_all, in_turns, learning_together

DATA = Path(os.environ.get("VQAD_TEST_DATA") or Path(__file__).parents[1].parent / "shared" / "data")

# What each process does: a few fits, of which the first writes down what came out. Started by torchrun it is one of
# two. Run alone it first forks two processes twice, as torchrun would start them but without what it takes to import
# torch: a training that kills itself, and one that goes on. Then it does alone what the two did, with their batches.
SCRIPT = """
import contextlib, json, os, signal, socket, sys, traceback
import numpy as np, torch
import vqad, vqad.collective as collective, vqad.training as training, vqad.training_run as training_run
from vqad.nn.ranks import summed

folder = sys.argv[1]
rng = np.random.default_rng(0)
kinds = np.repeat(["a", "b", "c"], 21)
X = (rng.standard_normal((63, 6, 6, 8)) + 3 * (kinds == "b")[:, None, None, None]).astype(np.float32)
new = rng.standard_normal((9, 6, 6, 8)).astype(np.float32)
losses, backward, is_deadly = [], training.Trainer._backward, False

def noted(self, *batch):
    total = backward(self, *batch)
    losses.append(float(summed(total.detach().clone())))
    if is_deadly and len(losses) == 14:
        os._exit(9)
    return total

training.Trainer._backward = noted
n_passes = 0
def same_order(category, balance):
    global n_passes
    n_passes += 1
    return torch.randperm(len(category), generator=torch.Generator().manual_seed(n_passes))
plain_order = training_run.one_pass

shared = dict(backbone=None, max_iter=4, batch_size=8, false_alarm_rate=0.3, random_state=0, early_stopping=True)
detectors = {
    "hvq": vqad.HVQTransDetector(dropout=0.0, d_model=16, n_codes=8, **shared),
    "flow": vqad.VQFlowDetector(n_patterns=8, hidden=8, **shared),
    "kept": vqad.HVQTransDetector(d_model=16, n_codes=8, checkpoint_dir=folder + "/kept", **shared),
}

def learn(names, out, rank=0):
    global n_passes
    found = {}
    for name in names:
        losses.clear()
        n_passes = 0
        training_run.one_pass = plain_order if name == "kept" else same_order
        made = detectors[name].fit(X, category=kinds)
        scores = made.score_samples(new).tolist()
        told = collective.of_all((scores, made.offset_, made.loss_curve_))
        assert all(each == told[0] for each in told), "the processes differ"
        found[name] = {"losses": losses[:], "scores": scores, "curve": made.loss_curve_,
                       "validation": made.validation_curve_, "held_out": made.fitted_.held_out.score.tolist()}
        made.partial_fit(X[:8] + 9, category=["new"] * 8)
        found[name]["more"] = made.score_samples(new).tolist()
    if rank == 0:
        with open(f"{folder}/{out}.json", "w") as file:
            json.dump(found, file)

def two_forks(out, deadly):
    global is_deadly
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    forks = []
    for rank in range(2):
        forks.append(os.fork())
        if not forks[-1]:
            try:
                os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
                is_deadly = deadly and rank == 0
                with collective.learning_together():
                    learn(["kept"], out, rank)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(forks[0], 0)[1])
    if status:
        os.kill(forks[1], signal.SIGKILL)
    os.waitpid(forks[1], 0)
    return status

if "RANK" in os.environ:
    with collective.learning_together() as crew:
        learn(["hvq", "flow"], "two", crew.rank)
        detectors["kept"].set_params(checkpoint_dir=folder + "/whole")
        learn(["kept"], "whole", crew.rank)
else:
    first = torch.zeros(1, requires_grad=True)  # torch imports what it takes with the first step; no thread starts
    first.grad = torch.ones(1)
    torch.optim.AdamW([first]).step()
    assert two_forks("killed", True) == 9
    assert os.listdir(folder + "/kept"), "no checkpoint"
    assert two_forks("again", False) == 0
    two = collective.Crew(0, 2)
    def start_pass(self, train, category):
        self.order = collective.in_turns(train[same_order(train, 0)], two)
        self.n_done, self.total = 0, torch.zeros(())
    training_run.Run.start_pass = start_pass
    collective.batches = lambda order, size: collective.batches_of_all(order, size, two)
    learn(["hvq", "flow"], "one")
"""


REAL = """
import contextlib, json, os, sys
import numpy as np
import vqad
from vqad.datasets import load_mvtec
from vqad.distributed import learning_together
from vqad.metrics import image_auroc

out, root = sys.argv[1:3]
names = ["bottle", "magnetic_tile"]

def spread(images, n):
    rows = [np.flatnonzero(images.category == name) for name in names]
    return images[np.concatenate([own[np.linspace(0, len(own) - 1, min(n, len(own))).astype(int)] for own in rows])]

train = spread(load_mvtec(root, categories=names), 60)
test = spread(load_mvtec(root, categories=names, split="test"), 60)
shared, found = dict(image_size=160, max_iter=3, false_alarm_rate=0.1, random_state=0), {}
with contextlib.nullcontext() if "RANK" not in os.environ else learning_together() as crew:
    for kind in (vqad.HVQTransDetector, vqad.VQFlowDetector):
        made = kind(**shared).fit(train, category=train.category)
        if crew is None or crew.rank == 0:
            score = -made.score_samples(test)
            for name in names:
                own = test.category == name
                found[f"{kind.__name__} {name}"] = image_auroc(test.target[own], score[own])
if found:
    with open(out, "w") as file:
        json.dump(found, file)
"""


def run(code, processes, *arguments):
    """Run a script by so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(code), *map(str, arguments)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """What came out of the script, run by two processes and by one."""
    if not hasattr(os, "fork"):
        pytest.skip("trainings are killed in forks")
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "script.py").write_text(SCRIPT)
    for processes in (2, 1):
        run(folder / "script.py", processes, folder)
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.slow
def test_two_processes_learn_what_one_does(learned):
    for name in ("hvq", "flow"):
        one, two = learned["one"][name], learned["two"][name]
        assert len(one["losses"]) == len(two["losses"]) >= 20
        np.testing.assert_allclose(two["losses"][:20], one["losses"][:20], atol=1e-4)
        np.testing.assert_allclose(two["curve"], one["curve"], rtol=1e-3)
        np.testing.assert_allclose(two["validation"], one["validation"], rtol=1e-3)
        for what in ("held_out", "scores", "more"):
            assert np.corrcoef(two[what], one[what])[0, 1] > 0.99, (name, what)


@pytest.mark.slow
def test_two_processes_that_were_killed_go_on_to_the_same_model(learned):
    whole, again = learned["whole"]["kept"], learned["again"]["kept"]
    assert "killed" not in learned
    assert len(again["losses"]) < len(whole["losses"])
    assert again["curve"] == whole["curve"]
    assert again["scores"] == whole["scores"]


@pytest.mark.slow
@pytest.mark.skipif(
    not all((DATA / name / "train" / "good").is_dir() for name in ("bottle", "magnetic_tile")),
    reason=f"NO REAL IMAGES: set VQAD_TEST_DATA to a folder in MVTec layout with bottle, magnetic_tile (not in {DATA})",
)
def test_two_processes_find_what_one_does_on_real_images(tmp_path):
    (tmp_path / "script.py").write_text(REAL)
    for processes in (1, 2):
        run(tmp_path / "script.py", processes, tmp_path / f"{processes}.json", DATA)
    alone, together = (json.loads((tmp_path / f"{processes}.json").read_text()) for processes in (1, 2))
    assert len(alone) == 4
    assert together == pytest.approx(alone, abs=0.01)


def test_batches_of_several_processes_have_something_of_each():
    crew, train = Crew(1, 3), torch.randperm(100, generator=torch.Generator().manual_seed(0))[:80]
    order = in_turns(train, crew)
    assert sorted(order.tolist()) == sorted(train.tolist())
    shares = [torch.bincount(crew.owner(batch), minlength=3) for batch in batches_of_all(order, 9, crew)]
    assert torch.stack(shares).min() >= 1
    assert torch.stack(shares[:-1]).max() <= 5
    own = torch.cat([crew.own(batch) for batch in batches_of_all(order, 9, crew)])
    assert own.tolist() == [row for row in train.tolist() if row % 3 == 1]


def test_a_process_that_is_alone_is_told_so(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError, match="torchrun --nproc-per-node"), learning_together():
        pass
