"""The noise: Philox's known answers, its place in the stream, its distribution."""

import math
import os
import subprocess
import sys

import pytest
import torch
from compare import assert_same

import fgbg_cuda
from fgbg_cuda import reference

# kat_vectors of Random123 (Salmon et al. 2011), philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip

# float32 polynomials against a float64 Box-Muller, at values of up to 6.7.
NOISE_ERROR = 2e-6


def _words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    assert list(fgbg_cuda._C.philox4x32_10(_words(counter), _words(key))) == _words(answer)
    tensors = [[torch.tensor(w) for w in _words(text)] for text in (counter, key)]
    assert [x.item() for x in reference.philox4x32_10(*tensors)] == _words(answer)


def _box_muller(words):
    """The four normals of a block, in Python floats."""
    u = [float(torch.tensor((x + 0.5) * 2.0**-32, dtype=torch.float32)) for x in words]
    out = []
    for radius, turn in ((u[0], u[1]), (u[2], u[3])):
        r = math.sqrt(-2 * math.log(radius))
        out += [r * math.cos(2 * math.pi * turn), r * math.sin(2 * math.pi * turn)]
    return out


def _stream(seed, offset, count):
    """The definition, one number at a time, from the words of the compiled Philox."""
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    numbers = []
    for i in range(offset, offset + count):
        block = i // 4
        words = fgbg_cuda._C.philox4x32_10([block & 0xFFFFFFFF, block >> 32, 0, 0], key)
        numbers.append(_box_muller(words)[i % 4])
    return torch.tensor(numbers, dtype=torch.float64)


SEEDS = (0, 1, -1, 2**32 + 5, 2**63 - 1, -(2**63))
# Past 2^34 a block number needs its high word; 2^63 is where a signed index would end.
OFFSETS = (0, 3, 2**32 - 2, 2**34 - 2, 2**34 + 1, 2**40 + 3, 2**63 - 40, 2**63 - 3)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("offset", OFFSETS)
def test_stream_is_the_definition(seed, offset, device):
    expected = _stream(seed, offset, 13).to(device)
    actual = fgbg_cuda.philox_normal(seed, (13,), offset=offset, dtype=torch.float64, device=device)
    assert (actual - expected).abs().max() < NOISE_ERROR
    seed = torch.tensor([seed], device=device)
    specified = reference.philox_normal(seed, (13,), offset, torch.float64)
    assert (specified - expected).abs().max() < NOISE_ERROR


def test_long_stream_is_the_specification(device):
    seed = torch.tensor([77], device=device)
    specified = reference.philox_normal(seed, (300, 1001), 5, torch.float64)
    actual = fgbg_cuda.philox_normal(seed, (300, 1001), offset=5, dtype=torch.float64)
    assert (actual - specified).abs().max() < NOISE_ERROR


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_types_hold_the_float32_numbers(dtype, device):
    single = fgbg_cuda.philox_normal(3, (1000,), device=device)
    assert_same(fgbg_cuda.philox_normal(3, (1000,), dtype=dtype, device=device), single.to(dtype))


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 511, 512, 513, 4095, 4097])
def test_parts_make_the_whole(cut, device):
    """Any part of a stream, from any offset, has the numbers of the whole, bit for bit."""
    whole = fgbg_cuda.philox_normal(9, (9001,), offset=2, device=device)
    parts = [
        fgbg_cuda.philox_normal(9, (cut,), offset=2, device=device),
        fgbg_cuda.philox_normal(9, (9001 - cut,), offset=2 + cut, device=device),
    ]
    assert_same(torch.cat(parts), whole)


@pytest.mark.parametrize("op", [fgbg_cuda.reparameterize, fgbg_cuda.sample_gaussian])
def test_split_batch_is_the_whole_batch(op, device):
    mu, logvar = torch.randn(2, 6, 37, device=device)
    whole = op(mu, logvar, seed=4)
    parts = [op(mu[i : i + 2], logvar[i : i + 2], seed=4, offset=i * 37) for i in (0, 2, 4)]
    if op is fgbg_cuda.sample_gaussian:
        whole, parts = whole[0], [z for z, _ in parts]
    assert_same(torch.cat(parts), whole)


def test_stacked_draws_are_one_stream(device):
    mu, logvar = torch.zeros(2, 3, 7, device=device)
    z = fgbg_cuda.reparameterize(mu, logvar, num_samples=5, seed=8, offset=3)
    assert_same(z, fgbg_cuda.philox_normal(8, (5, 3, 7), offset=3, device=device))


@pytest.mark.parametrize("shape", [(4, 6, 8, 10), (3, 4, 5)])
def test_noise_does_not_depend_on_the_layout(shape, device):
    mu, logvar = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    expected = fgbg_cuda.philox_normal(6, shape, device=device)
    backwards = tuple(reversed(range(len(shape))))
    transposed = mu.permute(backwards).contiguous().permute(backwards)
    assert_same(fgbg_cuda.reparameterize(transposed, logvar, seed=6), expected)
    if mu.dim() == 4:
        last = mu.contiguous(memory_format=torch.channels_last)
        assert_same(fgbg_cuda.reparameterize(last, last, seed=6), expected)


def test_seed_sources_agree(device):
    """An integer, a tensor holding it, and a generator are ways to say the same."""
    mu, logvar = torch.zeros(2, 3, 5, device=device)
    by_int = fgbg_cuda.reparameterize(mu, logvar, seed=5)
    for seed in (torch.tensor([5]), torch.tensor(5), torch.tensor([[5]])):
        assert_same(fgbg_cuda.reparameterize(mu, logvar, seed=seed.to(device)), by_int)
    draws = []
    for _ in range(2):
        generator = torch.Generator(device).manual_seed(3)
        draws.append(fgbg_cuda.reparameterize(mu, logvar, generator=generator))
        draws.append(fgbg_cuda.reparameterize(mu, logvar, generator=generator))
    assert_same(draws[0], draws[2])
    assert_same(draws[1], draws[3])
    assert not torch.equal(draws[0], draws[1])


def test_manual_seed_governs_unseeded_draws(device):
    mu, logvar = torch.zeros(2, 3, 5, device=device)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(fgbg_cuda.reparameterize(mu, logvar))
    assert_same(draws[0], draws[1])
    assert not torch.isclose(draws[0], draws[2]).any()


def test_a_seed_tensor_on_its_own_decides_the_device(device):
    seed = torch.tensor([1], device=device)
    assert fgbg_cuda.philox_normal(seed, (3,)).device.type == device.type


def test_moments_and_distribution(device):
    """Bounds of five standard errors: a fixed seed, so no chance involved once it passes."""
    n = 1 << 22
    z = fgbg_cuda.philox_normal(2024, (n,), device=device).double()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    # Kolmogorov-Smirnov: sqrt(n) D exceeds 1.95 with probability 0.001.
    steps = torch.arange(1, n + 1, device=device, dtype=torch.float64) / n
    distance = (torch.special.ndtr(z.sort().values) - steps).abs().max() + 1 / n
    assert math.sqrt(n) * distance < 1.95


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 512])
def test_neighbours_are_uncorrelated(lag, device):
    """Of the values and of their squares: the two numbers of a Box-Muller pair share a radius."""
    n = 1 << 20
    z = fgbg_cuda.philox_normal(5, (n + lag,), device=device).double()
    for x, variance in ((z, 1.0), (z**2 - 1, 2.0)):
        assert abs((x[lag:] * x[:-lag]).mean()) < 5 * variance / math.sqrt(n)


def test_neighbouring_seeds_are_uncorrelated(device):
    n = 1 << 20
    a, b = (fgbg_cuda.philox_normal(s, (n,), device=device).double() for s in (41, 42))
    assert abs((a * b).mean()) < 5 / math.sqrt(n)


@pytest.mark.parametrize(("seed", "index", "word"), [(32, 16772569, 0), (29, 3949195, 2)])
def test_tail_beyond_six_sigma(seed, index, word, device):
    """Blocks whose radius word is nearly 0, found by search, lie in the far tail."""
    words = fgbg_cuda._C.philox4x32_10([index // 4, 0, 0, 0], [seed, 0])
    assert words[word] < 64
    z = fgbg_cuda.philox_normal(seed, (1,), offset=index, dtype=torch.float64, device=device)
    assert abs(z.item()) > 6
    assert abs(z.item() - _box_muller(words)[index % 4]) < NOISE_ERROR


_EVERYTHING = """
import sys, torch, fgbg_cuda
x = fgbg_cuda.philox_normal(1, (3, 2, 65, 33))
y = fgbg_cuda.philox_normal(2, (3, 2, 65, 33))
out = {"name": fgbg_cuda.build_info()["cpu_capability"], "noise": x}
out["kl"] = fgbg_cuda.gaussian_kl(x, y, reduction="none")
out["bernoulli"] = fgbg_cuda.bernoulli_kl(x, y, reduction="none")
for likelihood in fgbg_cuda.reference.LIKELIHOODS:
    out[likelihood] = fgbg_cuda.mixture_reconstruction_loss(
        x, y, x.sigmoid(), mask_logits=(x * y)[:, :1], likelihood=likelihood, reduction="none"
    )
torch.save(out, sys.argv[1])
"""


def test_instruction_sets_agree(tmp_path):
    """Each choice of FGBG_CPU_CAPABILITY gives the same noise, and losses to float32 rounding."""
    results = {}
    for capability in ("portable", "avx2", "avx512"):
        path = tmp_path / capability
        subprocess.run(
            [sys.executable, "-c", _EVERYTHING, str(path)],
            env={**os.environ, "FGBG_CPU_CAPABILITY": capability},
            check=True,
        )
        results[capability] = torch.load(path)
    assert results["portable"].pop("name") == "portable"
    for capability in ("avx2", "avx512"):
        # Where the machine has no such instructions, a lesser set runs.
        assert results[capability].pop("name") in ("portable", "avx2", capability)
        for key, expected in results["portable"].items():
            error = (results[capability][key] - expected).abs()
            assert bool((error < NOISE_ERROR * expected.abs().clamp(min=1)).all()), (capability, key)
