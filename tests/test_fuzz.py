"""Random calls against the specification, see fuzzing.py. `make fuzz N=10000 SEED=7` runs more of them."""

import os

import pytest
import torch

pytest.importorskip("hypothesis")

import fuzzing
from hypothesis import HealthCheck, Phase, given, seed, settings

import fgbg_cuda
from fgbg_cuda import _checks, functional
from fgbg_cuda.functional import _routes

CASES = int(os.environ.get("FGBG_FUZZ_CASES", "400"))
SEED = int(os.environ.get("FGBG_FUZZ_SEED", "1"))


@pytest.fixture(autouse=True)
def _setting(threads):
    """The number of threads comes back after each test; counts begin anew."""
    fuzzing.COUNTS.clear()


def _fuzz(strategy, body, count, phases=tuple(Phase), with_seed=SEED):
    @seed(with_seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(drawn):
        body(drawn)

    run()


def _say(capsys, text):
    with capsys.disabled():
        print(f"\nfuzz, seed {SEED}: {text}")


def test_results_and_gradients(device, capsys):
    _fuzz(fuzzing.cases(), lambda case: fuzzing.check(case, device), CASES)
    counts = fuzzing.COUNTS
    _say(capsys, ", ".join(f"{k}: {n}" for k, n in counts.most_common()))
    # That the cases test something: most run a kernel, on numbers whose expected results are known well.
    assert counts["cases"] >= 0.9 * CASES
    assert counts["reach a kernel"] > 0.8 * counts["cases"]
    assert counts["reach a backward kernel"] > 0.5 * counts["cases"]
    assert counts["compare finite numbers"] > 0.9 * counts["cases"]
    assert counts["compare them to a percent or better"] > 0.75 * counts["cases"]
    assert counts["wild"] > 0.1 * counts["cases"]
    assert all(counts[op] for op in fuzzing.OPS)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_invalid_calls_are_refused(device, capsys):
    _fuzz(fuzzing.refusals(), lambda call: fuzzing.check_refused(*call, device), CASES // 2)
    counts = fuzzing.COUNTS
    _say(capsys, f"{counts['refused']} invalid calls refused")
    assert counts["refused"] >= 0.9 * (CASES // 2)


# --- the fuzzer itself: what is planted is found --------------------------------------------------


def _few(strategy, body, count):
    """Always the same cases, among them one that each plant shows in: an infinity, say, is rare."""
    _fuzz(strategy, body, count, phases=(Phase.generate,), with_seed=1)


def _outputs(change):
    """Applies a change to the first output of an op, or to both that sample_gaussian has."""

    def planted(op):
        def call(*args):
            out = op(*args)
            if out is None:
                return None
            return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

        return call

    return planted


def _last_element(x):
    if x.dim() < 2 or x.numel() < 2:
        return x
    wrong = torch.zeros_like(x)
    wrong[(-1,) * wrong.dim()] = 0.1
    return x + wrong


def _gradient(x):
    return x + 0.001 * (x - x.detach()).nan_to_num()


def _thread_count(x):
    return x * (1 + (torch.get_num_threads() - 1) * 4e-7)


def _write_to_operand(op):
    def call(*args):
        tensors = [t for t in args if isinstance(t, torch.Tensor) and t.is_floating_point()]
        out = op(*args)
        if tensors and tensors[0].numel() and not any(t.requires_grad for t in tensors):
            tensors[0][(0,) * tensors[0].dim()] += 1
        return out

    return call


PLANTS = {
    "a value off by 1e-4": _outputs(lambda x: x * 1.0001),
    "one element off": _outputs(_last_element),
    "a gradient off by 1e-3": _outputs(_gradient),
    "no gradient": _outputs(lambda x: x.detach()),
    "a NaN hidden": _outputs(lambda x: x.nan_to_num(0.0)),
    "an infinity hidden": _outputs(lambda x: x.masked_fill(x.isinf(), 0.0)),
    "threads change the result": _outputs(_thread_count),
    "another type": _outputs(lambda x: x.double()),
    "an operand written to": _write_to_operand,
}


def _plant(monkeypatch, change):
    monkeypatch.setattr(_routes, "eager", fuzzing.Eager(lambda name, function: change(function)))


def test_planted_noise_is_found(monkeypatch):
    monkeypatch.setattr(fuzzing, "OPS", ("philox_normal",))
    _plant(monkeypatch, _outputs(lambda x: x + 1e-5))
    with pytest.raises(AssertionError, match=r"check\(Case"):
        _few(fuzzing.cases(), fuzzing.check, 20)


@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_planted_is_found(plant, monkeypatch):
    _plant(monkeypatch, PLANTS[plant])
    with pytest.raises(AssertionError, match=r"check\(Case|depends on|gradient|expected|written"):
        _few(fuzzing.cases(), fuzzing.check, 300)


def test_another_exception_is_found(monkeypatch):
    def choice(name, value, choices):
        if value not in choices:
            raise KeyError(value)

    monkeypatch.setattr(_checks, "choice", choice)
    with pytest.raises(KeyError):
        _few(fuzzing.refusals(), lambda call: fuzzing.check_refused(*call), 1000)


def test_an_accepted_call_is_found(monkeypatch):
    monkeypatch.setattr(_checks, "number", lambda name, value, **bounds: float(value))
    with pytest.raises(AssertionError, match=r"accepted|after work|names no"):
        _few(fuzzing.refusals(), lambda call: fuzzing.check_refused(*call), 300)


def test_every_public_function_is_fuzzed():
    public = {n for n in functional.__all__ if callable(getattr(fgbg_cuda, n)) and n[0].islower()}
    assert public == set(fuzzing.OPS)
