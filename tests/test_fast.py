"""What is there for speed alone computes the same as what it stands for."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys

import pytest
import torch

import vqad.nn.fast.efficientnet
from vqad.backbones import load_backbone, state_digest
from vqad.nn.fast.efficientnet import ready_network
from vqad.nn.fast.memory import keep_freed_memory

# ------------------------------------------------------------------ backbones


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_b0", "efficientnet_es", "resnet18"])
def test_ready_network_computes_the_same_and_leaves_the_network_as_it_is(name):
    torch.manual_seed(0)
    network = load_backbone(name, "random", (1, 2))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # random weights come with normalisations that do nothing
            for value in (module.running_mean, module.weight.data, module.bias.data):
                value.normal_()
            module.running_var.uniform_(0.5, 2)
    digest, pixels = state_digest(network), torch.randn(2, 3, 64, 64, requires_grad=True)
    ready = ready_network(network, torch.float32)

    def run(net: torch.nn.Module) -> list[torch.Tensor]:
        maps = net(pixels)
        return [*maps, *torch.autograd.grad(sum(m.square().mean() for m in maps), pixels)]

    for mine, theirs in zip(run(ready), run(network), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.detach().abs().max()))
    assert ready_network(network, torch.float32) is ready
    assert state_digest(network) == digest
    folded = not any(isinstance(module, torch.nn.BatchNorm2d) for module in ready.modules())
    assert folded == ("efficientnet" in name)


def test_ready_network_in_bfloat16_is_the_network_under_autocast():
    network = load_backbone("tf_efficientnet_lite0", "random", (1, 2))
    pixels = torch.randn(1, 3, 64, 64)
    ready = ready_network(network, torch.bfloat16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for mine, theirs in zip(ready(pixels), network(pixels), strict=True):
            assert mine.dtype == theirs.dtype == torch.bfloat16
            assert (mine.float() - theirs.float()).norm() < 0.05 * theirs.float().norm()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_beside_one_that_prepares_a_network_can_prepare_one():
    network = torch.nn.Identity()
    with vqad.nn.fast.efficientnet._PREPARING:
        child = os.fork()
        if not child:
            signal.alarm(10)
            ready_network(network, torch.float32)
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


# ------------------------------------------------------------------ freed memory

PAGE_FAULTS = """
import ctypes, resource
import torch
from vqad.nn.fast.memory import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    del [torch.ones(2**21) for _ in range(8)][:]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def usual():
    return sorted(faults() for _ in range(9))[4]  # now and then the system takes pages away, or counts none

# As glibc starts; what it makes of that later depends on what was freed before, and where.
for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
    assert ctypes.CDLL(None).mallopt(parameter, 2**17)
before = usual()
assert keep_freed_memory()
print(before, usual())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to keep freed memory")
@pytest.mark.parametrize("of_dask", [{}, {"MALLOC_TRIM_THRESHOLD_": "65536"}])
def test_freed_memory_is_taken_again_without_page_faults(of_dask):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    environment |= of_dask
    command = [sys.executable, "-c", PAGE_FAULTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after < 0.2 * before


def test_an_allocator_that_the_user_chose_is_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    assert not keep_freed_memory.__wrapped__()
