"""Where and how to compute: modules on a device, and what torch keeps for the whole process."""

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import vqad._decode
import vqad.backbones
from vqad import HVQTransDetector, VQFlowDetector
from vqad.engine import Engine, learning, one_core_each, seeded, side_by_side, undisturbed
from vqad.images import check_images
from vqad.nn.draws import drawing
from vqad.streaming import readers
from vqad.training import Trainer

CPU, ELSEWHERE = torch.device("cpu"), torch.device("cuda")


class Counted(torch.nn.Module):
    """Notes how often something was made of it."""

    def __init__(self):
        super().__init__()
        self.weight, self.made = torch.nn.Parameter(torch.zeros(3)), []

    def ready(self):
        self.made.append(torch.nn.Linear(1, 1))
        return self.made[-1]


def test_on_a_cpu_a_module_is_where_it_belongs():
    module = Counted()
    assert Engine(CPU).resident(module) is module


def test_a_copy_stays_on_the_device_as_long_as_its_module_lives():
    module, other, elsewhere = Counted(), Counted(), Engine(torch.device("meta"))
    there = elsewhere.resident(module)
    assert there.weight.device.type == "meta"
    assert module.weight.device.type == "cpu"
    assert elsewhere.resident(module) is there
    assert elsewhere.resident(other) is not there
    copy = weakref.ref(there)
    del module, there
    gc.collect()
    assert copy() is None


def test_a_move_that_failed_leaves_nothing(monkeypatch):
    module, elsewhere = Counted(), Engine(torch.device("meta"))
    with monkeypatch.context() as full:
        full.setattr(Counted, "to", never)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            elsewhere.resident(module)
    assert module.weight.device.type == "cpu"
    assert elsewhere.resident(module).weight.device.type == "meta"


def never(*args):
    raise torch.cuda.OutOfMemoryError("full")


def test_what_is_ready_is_made_once_for_each_device():
    module = Counted()
    ready = Engine(CPU).ready(module)
    assert Engine(CPU).ready(module) is ready
    assert Engine(CPU, torch.bfloat16).ready(module) is ready
    assert len(module.made) == 1
    assert Engine(torch.device("meta")).ready(module) is not ready


def test_threads_that_ask_at_once_get_one_copy():
    module, elsewhere, found = Counted(), Engine(torch.device("meta")), []
    threads = [threading.Thread(target=lambda: found.append(elsewhere.resident(module))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1


def test_threads_that_are_born_while_others_compute_with_one_core_each():
    before, seen = torch.get_num_threads(), []

    def look():
        with one_core_each() as threads, undisturbed():
            seen.append((threads, torch.get_num_threads()))

    def work(part):
        born = threading.Thread(target=look)
        born.start()
        born.join()
        return [torch.get_num_threads()]

    torch.set_num_threads(3)
    try:
        assert list(side_by_side(work, np.arange(6), CPU)) == [1, 1, 1]
        assert torch.get_num_threads() == 3
        look()
    finally:
        torch.set_num_threads(before)
    assert seen == [(3, 3)] * 4


def test_threads_of_a_pool_share_those_that_read():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for n_jobs, each, alone in ((None, 0, 0), (1, 0, 0), (2, 1, 2), (5, 1, 5), (6, 2, 6)):
            assert list(side_by_side(lambda part, n=n_jobs: [readers(n)], np.arange(6), CPU)) == [each] * 3
            assert readers(n_jobs) == alone
    finally:
        torch.set_num_threads(before)


def test_a_seed_of_the_cpu_is_that_of_torch_and_no_other_devices(monkeypatch):
    torch.manual_seed(5)
    expected = torch.rand(3)

    def refuse(*args, **kwargs):
        raise AssertionError("seeded the other devices too")

    queued = list(torch.cuda._queued_calls)
    for module in (torch.cuda, torch.mps, torch.xpu):
        for name in ("manual_seed", "manual_seed_all"):
            monkeypatch.setattr(module, name, refuse, raising=False)
    with seeded(5, CPU):
        assert torch.equal(torch.rand(3), expected)
    with learning(5, CPU), drawing():
        assert torch.equal(torch.rand(3), expected)
    assert torch.cuda._queued_calls == queued


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_a_seed_leaves_the_cuda_generators_as_they_were():
    torch.cuda.manual_seed_all(3)
    before = torch.cuda.get_rng_state_all()
    with seeded(5, ELSEWHERE):
        drawn = torch.rand(3, device=ELSEWHERE)
    with seeded(5, torch.device("cuda", torch.cuda.current_device())):
        assert torch.equal(torch.rand(3, device=ELSEWHERE), drawn)
    with seeded(6, CPU):
        pass
    for state, old in zip(torch.cuda.get_rng_state_all(), before):
        assert torch.equal(state, old)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_beside_one_that_reads_can_read():
    image = Image.new("L", (4, 4))
    with vqad._decode._LOADING:
        child = os.fork()
        if not child:
            signal.alarm(10)
            check_images([image]).pixels(0)
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_beside_a_fit_can_fit():
    inside, go_on = threading.Event(), threading.Event()

    def hold():
        with undisturbed():
            inside.set()
            go_on.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait()
    threads = torch.get_num_threads()
    with one_core_each():
        child = os.fork()
        if not child:
            signal.alarm(10)
            torch.set_num_threads(threads + 1)  # the pool of the parent counts no longer
            with undisturbed(), one_core_each() as mine:
                os._exit(mine != threads + 1)
    go_on.set()
    holder.join()
    assert os.waitpid(child, 0)[1] == 0


AFTER_MAIN = """
import threading
import numpy as np, torch
from vqad.engine import side_by_side

def later():
    threading.main_thread().join()
    print(sum(side_by_side(list, np.arange(100), torch.device("cpu"))))

torch.set_num_threads(2)
threading.Thread(target=later).start()
"""


def test_a_thread_that_outlives_the_main_one_may_compute():
    done = subprocess.run([sys.executable, "-c", AFTER_MAIN], capture_output=True, text=True, check=False)
    assert done.stdout == "4950\n", done.stderr


def test_fits_that_share_nothing_run_at_once_and_as_alone():
    """Each waits, in its first step of training, until the others are there too."""
    rows, state = np.random.default_rng(0).standard_normal((40, 3, 3, 8)).astype(np.float32), torch.get_rng_state()
    together, waited = threading.Barrier(3), threading.local()

    def fit(seed):
        made = (HVQTransDetector if seed else VQFlowDetector)(
            backbone=None, max_iter=2, random_state=seed, false_alarm_rate=0.3
        )
        return made.fit(rows).score_samples(rows)

    alone = [fit(seed) for seed in range(3)]
    plain = Trainer._backward

    def wait_once(self, *batch):
        if not getattr(waited, "done", False):
            waited.done = True
            together.wait(timeout=60)
        return plain(self, *batch)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(3) as pool:
        patch.setattr(Trainer, "_backward", wait_once)
        for found, expected in zip(pool.map(fit, range(3)), alone):
            np.testing.assert_array_equal(found, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_pool_inside_a_pool_leaves_its_threads_with_one_core():
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    def work(rows):
        list(side_by_side(lambda part: part.tolist(), rows, CPU))
        return [torch.get_num_threads()]

    try:
        assert set(side_by_side(work, np.arange(4), CPU)) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
