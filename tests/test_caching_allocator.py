"""All but small results on the CPU come from a caching allocator (csrc/cpu/caching_allocator.h): blocks that
are kept when they are freed, for the next result of the same size. Nobody should notice."""

import copy
import gc
import io
import math
import os
import signal
import threading
import time

import pytest
import torch
from benchmarks.memory import peak_bytes
from compare import assert_same

import fgbg_cuda

CACHED = (3, 2**15)  # 384 KB of float32
LARGE = (3, 2**20)  # 12 MB, in huge pages


@pytest.mark.parametrize("size", [CACHED, LARGE])
def test_living_results_never_share_memory(size):
    noise = {seed: fgbg_cuda.philox_normal(seed, size) for seed in range(3)}
    expected = {seed: t.clone() for seed, t in noise.items()}
    del noise[1]
    more = [fgbg_cuda.philox_normal(seed, size) for seed in (7, 8)]
    for seed, t in noise.items():
        assert_same(t, expected[seed])
    whole = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (*noise.values(), *more)]
    assert all(a[1] <= b[0] or b[1] <= a[0] for a in whole for b in whole if a is not b)


@pytest.mark.parametrize("size", [CACHED, LARGE])
def test_a_view_keeps_its_memory(size):
    view = fgbg_cuda.philox_normal(1, size)[1:2]
    expected = view.clone()
    gc.collect()
    fgbg_cuda.philox_normal(2, size)
    assert_same(view, expected)


AROUND = [(n + d,) for n in (2**15, 2**18) for d in (-1, 0, 1)]


@pytest.mark.parametrize("size", [*AROUND, (5, 2**19 + 3)])
def test_they_behave_like_any_tensor(size):
    """Around the sizes from which results are kept, and are large: written, resized, copied, saved."""
    t = fgbg_cuda.philox_normal(1, size)
    expected = torch.from_numpy(t.numpy().copy())
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=True), expected)
    assert_same(copy.deepcopy(t), expected)
    assert_same(t.clone().resize_(2 * t.numel())[: t.numel()].view(size), expected)
    grown = fgbg_cuda.philox_normal(1, size).resize_(3 * t.numel())
    assert_same(grown[: t.numel()].view(size), expected)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_gradients_have_the_layout_of_their_inputs(layout):
    x = torch.rand(8, 3, 128, 128).to(memory_format=layout).requires_grad_()
    fgbg_cuda.masked_reconstruction_loss(x, None, x.detach(), mask=torch.rand(8, 1, 128, 128)).backward()
    assert x.grad.stride() == x.stride()


def test_memory_is_counted():
    """By the profiler, as all of torch's is; also the second time, when a kept block is taken."""
    for size in (CACHED, LARGE):
        for _ in range(2):
            assert (
                peak_bytes(lambda size=size: fgbg_cuda.philox_normal(1, size), "cpu")
                == 4 * math.prod(size) + 8
            )


def test_many_threads():
    def work(seed):
        for _ in range(20):
            results.append((seed, fgbg_cuda.philox_normal(seed, (2**19,))[::4099].clone()))

    results = []
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    expected = {seed: fgbg_cuda.philox_normal(seed, (2**19,))[::4099] for seed in range(4)}
    assert len(results) == 80
    for seed, found in results:
        assert_same(found, expected[seed])


def test_a_freed_block_is_taken_again():
    fgbg_cuda.empty_cpu_cache()
    assert fgbg_cuda.cpu_cache_bytes() == 0
    address = fgbg_cuda.philox_normal(1, LARGE).data_ptr()
    assert fgbg_cuda.cpu_cache_bytes() >= 4 * math.prod(LARGE)
    assert fgbg_cuda.philox_normal(2, LARGE).data_ptr() == address
    fgbg_cuda.empty_cpu_cache()
    assert fgbg_cuda.cpu_cache_bytes() == 0


def test_no_more_than_128_megabytes_are_kept():
    fgbg_cuda.empty_cpu_cache()
    noise = [fgbg_cuda.philox_normal(seed, LARGE) for seed in range(12)]
    del noise
    assert fgbg_cuda.cpu_cache_bytes() == 10 * 12 * 2**20


def test_the_switch():
    fgbg_cuda.empty_cpu_cache()
    fgbg_cuda.use_cpu_cache(False)
    try:
        fgbg_cuda.philox_normal(1, LARGE)
        assert fgbg_cuda.cpu_cache_bytes() == 0
    finally:
        fgbg_cuda.use_cpu_cache(True)
    fgbg_cuda.philox_normal(1, LARGE)
    assert fgbg_cuda.cpu_cache_bytes() == 12 * 2**20


def test_a_forked_process_can_allocate(threads):
    """Also if another thread was about to, in the parent, and held the lock."""
    running = threading.Event()
    running.set()

    def allocate():
        while running.is_set():
            fgbg_cuda.philox_normal(1, CACHED)

    worker = threading.Thread(target=allocate)
    threads(1)  # OpenMP's threads do not survive a fork
    worker.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                fgbg_cuda.philox_normal(1, CACHED)
                os._exit(0)
            for _ in range(1000):
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    break
                time.sleep(0.01)
            else:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            assert done
            assert status == 0
    finally:
        running.clear()
        worker.join()
