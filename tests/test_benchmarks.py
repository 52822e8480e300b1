"""The benchmark's function, never its speed: it measures what it says and refuses peers that differ."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from benchmarks import __main__ as benchmarks
from benchmarks import report
from benchmarks.cases import FORWARD_OP, IMAGE_OPS, Case, Plan, all_plans, quick_plans
from benchmarks.checking import Disagreement, checker
from benchmarks.comparison import compare
from benchmarks.determinism import fingerprint, in_deterministic_mode
from benchmarks.memory import peak_bytes
from benchmarks.peers import PEERS, step_of
from benchmarks.sections import DEFAULT
from benchmarks.tables import markdown, section_cells, slope, text
from benchmarks.timing import QUICK, Deadline, measure

ROOT = Path(__file__).parent.parent
IMAGES, LATENTS = (4, 3, 8, 8), (8, 4)


def case_of(op: str, size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Case:
    return Plan(op, size, dtype, "cpu").make()


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that a quick run of every section leaves."""
    out = tmp_path_factory.mktemp("benchmarks") / "quick.json"
    benchmarks.main(["--quick", "--out", str(out)])
    return out


def test_a_run_records_where_it_ran_and_every_figure(quick: Path):
    result = json.loads(quick.read_text())
    assert result["quick"] is True
    assert result["skipped"] == 0
    assert result["copy"]["bytes_per_second"] > 0
    machine = result["machine"]
    assert machine["torch"] == torch.__version__
    assert machine["threads"] == torch.get_num_threads()
    for key in ("processor", "cores", "load", "python", "system", "date", "build"):
        assert key in machine
    assert list(result["sections"]) == list(DEFAULT)
    for name, rows in result["sections"].items():
        assert rows, name
        for row in rows:
            assert {"op", "size", "dtype", "threads", "perfect_bytes"} <= set(row)
            assert {"ours", "eager"} <= set(row["peers"])
            for figures in row["peers"].values():
                assert 0 < figures["low"] <= figures["median"] <= figures["high"]
                assert figures["rounds"] == QUICK.rounds
                assert name == "determinism" or figures["peak_bytes"] >= 0
    ops = result["sections"]["ops"]
    assert {row["op"] for row in ops} == {plan.op for plan in all_plans([torch.float32], "cpu")}
    assert {row["dtype"] for row in ops} == {"float32", "bfloat16"}
    assert any("compile" in row["peers"] for row in ops)


def test_every_section_becomes_a_table_of_its_rows(quick: Path):
    result = json.loads(quick.read_text())
    for name, rows in result["sections"].items():
        cells = section_cells(name, rows, result["copy"]["bytes_per_second"])
        assert {len(row) for row in cells} == {len(cells[0])}
        lines = len(rows) if name != "determinism" else sum(len(row["peers"]) for row in rows)
        assert len(cells) == lines + 1
        assert len(text(cells).splitlines()) == lines + 1
        assert len(markdown(cells).splitlines()) == lines + 2
        for row in rows:
            assert any(cell[0] == row["op"] for cell in cells[1:])


def test_ratios_and_shares_are_those_of_the_medians():
    def figures(seconds: float) -> dict:
        return {"median": seconds, "low": seconds, "high": seconds, "peak_bytes": 2**20}

    row = {"op": "an op", "size": [10, 10], "dtype": "float32", "threads": 1, "perfect_bytes": 1e6}
    row["peers"] = {"ours": figures(1e-3), "eager": figures(3e-3), "compile": figures(0.5e-3)}
    head, line = section_cells("ops", [row], 4e9)
    cells = dict(zip(head, line, strict=True))
    assert cells["eager / ours"] == "3.00"
    assert cells["compile / ours"] == "0.50"
    assert cells["GB/s"] == "1"  # 1 MB in 1 ms
    assert cells["of copy"] == "25%"
    assert cells["peak MiB ours"] == "1"
    larger = {**row, "size": [100, 10], "peers": {"ours": figures(1e-2)}}
    assert slope(row, larger, "ours") == pytest.approx(1)


def test_plots_are_written_beside_the_result(quick: Path):
    for kind in ("time", "limit", "growth-time", "growth-limit"):
        picture = quick.with_name(f"quick-{kind}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")


def test_a_budget_skips_what_it_has_no_time_for(tmp_path: Path):
    out = tmp_path / "none.json"
    benchmarks.main(["growth", "--quick", "--budget", "0", "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["sections"] == {"growth": []}
    assert result["skipped"] == 4
    assert not Deadline(None).passed()


def test_unknown_sections_and_peers_without_ours_are_refused(capsys: pytest.CaptureFixture):
    for arguments, message in ((["opps"], "unknown sections ['opps']"), (["--peers", "eager"], "needs it")):
        with pytest.raises(SystemExit):
            benchmarks.main(arguments)
        assert message in capsys.readouterr().err


# --- peers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ours_and_eager_agree_on_every_case(dtype: torch.dtype):
    for plan in quick_plans([dtype], "cpu"):
        case = plan.make()
        for name in ("ours", "eager"):
            checker(case)(name, PEERS[name](case))


def wrong_result(function):
    return lambda *inputs: function(*inputs) * 1.001


def wrong_gradient(function):
    """The right number, but what the first input contributes is taken for a constant in part."""

    def wrong(first, *others):
        return function(first * 0.999 + (first * 0.001).detach(), *others)

    return wrong


@pytest.mark.parametrize("spoil", [wrong_result, wrong_gradient])
def test_a_peer_that_computes_something_else_is_refused(spoil):
    for case in (
        *(case_of(op, IMAGES) for op in IMAGE_OPS),
        case_of("bernoulli_kl", IMAGES),
        case_of("gaussian_kl", LATENTS),
    ):
        with pytest.raises(Disagreement, match=f"an impostor does not compute {case.op} at"):
            checker(case)("an impostor", step_of(case, spoil(case.plain)))


def test_a_wrong_sample_is_refused():
    case = case_of("reparameterize", (64, 64))
    spoiled = {
        "too wide": lambda mu, logvar: mu + torch.exp(logvar) * torch.randn_like(mu),
        "no noise": lambda mu, logvar: mu + 0 * logvar,
        "no gradient through the width": lambda mu, logvar: case.plain(mu, logvar.detach() + 0 * logvar),
        "not a number": lambda mu, logvar: case.plain(mu, logvar) * torch.nan,
    }
    for function in spoiled.values():
        with pytest.raises(Disagreement):
            checker(case)("an impostor", step_of(case, function))


def test_a_wrong_peer_is_never_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(PEERS, "impostor", lambda case: step_of(case, wrong_result(case.plain)))
    case = case_of("masked gaussian", IMAGES)
    with pytest.raises(Disagreement, match="impostor"):
        compare(case, ("ours", "impostor"), QUICK)


def test_a_compiled_peer_is_compiled_in_one_piece():
    def broken(*inputs):
        torch._dynamo.graph_break()
        return inputs[0].sum()

    case = case_of("masked gaussian", IMAGES)
    case.plain = broken
    with pytest.raises(torch._dynamo.exc.Unsupported):
        PEERS["compile"](case)()


def test_the_triton_peer_computes_what_it_claims(tmp_path: Path):
    """In Triton's interpreter, which needs no GPU."""
    pytest.importorskip("triton")
    code = """
        import torch
        from benchmarks import triton_peer
        from benchmarks.cases import Plan
        from benchmarks.checking import checker
        from benchmarks.peers import step_of

        for table in (triton_peer.FUNCTIONS, triton_peer.ATOMIC_FUNCTIONS):
            for op, function in table.items():
                for dtype in (torch.float32, torch.bfloat16):
                    size = (3, 3, 31, 29) if op.startswith("masked") else (33, 77)
                    case = Plan(op, size, dtype, "cpu").make()
                    checker(case)("triton", step_of(case, function))
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


# --- measures -------------------------------------------------------------------------------------


def test_peak_memory_counts_what_is_alive_at_once():
    def chain() -> torch.Tensor:
        a = torch.empty(1000)
        b = torch.empty(500)
        del a
        return b.new_empty(700)

    assert peak_bytes(chain, "cpu") == 4 * 1500  # a and b; the 1200 at the end are fewer

    def inside() -> torch.Tensor:
        return torch.empty(100).new_empty(10, dtype=torch.float64)

    assert peak_bytes(inside, "cpu") == 480


def test_peak_memory_of_a_step_is_that_of_its_worst_moment():
    case = case_of("masked squared_error", (8, 1, 32, 32))
    fg, *_, target = case.inputs
    case.inputs = (fg, target)
    image, scalars = fg.numel() * fg.element_size(), 64

    # Forward holds the product, which nothing saves; backward one gradient, made of target and a scalar.
    peak = peak_bytes(step_of(case, lambda x, t: (x * t).sum()), "cpu")
    assert image <= peak <= image + scalars
    # Here the exponential is saved: it and the gradient are alive at once.
    peak = peak_bytes(step_of(case, lambda x, t: x.exp().sum()), "cpu")
    assert 2 * image <= peak <= 2 * image + scalars
    assert fg.grad is None  # nothing stays behind


def test_perfect_bytes_are_the_operands_and_the_gradients():
    b, c, h, w = IMAGES
    image, mask = b * c * h * w, b * h * w
    for dtype, bytes_each in ((torch.float32, 4), (torch.bfloat16, 2)):
        both = case_of("masked gaussian", IMAGES, dtype)
        assert both.perfect_bytes == bytes_each * ((3 * image + mask) + (2 * image + mask))
        forward = case_of(FORWARD_OP, IMAGES, dtype)
        assert forward.perfect_bytes == bytes_each * (3 * image + mask)
        n = math.prod(LATENTS)
        counts = {"gaussian_kl": 2 + 2, "reparameterize": 2 + 1 + 2 + 1, "sample_gaussian": 2 + 1 + 3 + 2}
        counts |= {"bernoulli_kl": 1 + 1, "philox_normal": 1}
        for op, count in counts.items():
            assert case_of(op, LATENTS, dtype).perfect_bytes == bytes_each * count * n


def test_timing_runs_on_the_threads_of_the_process(threads):
    """torch's Timer would set one thread."""
    threads(2)
    seen = set()
    measure({"f": lambda: seen.add(torch.get_num_threads())}, "cpu", QUICK)
    assert seen == {2}
    assert torch.get_num_threads() == 2


def test_the_deterministic_mode_is_on_inside_and_off_after():
    modes = []
    in_deterministic_mode(lambda: modes.append(torch.are_deterministic_algorithms_enabled()))()
    assert modes == [True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_fingerprints_tell_single_bits_apart():
    one = torch.ones(3)
    assert fingerprint([one]) == fingerprint([one.clone()])
    assert fingerprint([one]) != fingerprint([torch.nextafter(one, 2 * one)])
    assert fingerprint([torch.zeros(1)]) != fingerprint([-torch.zeros(1)])


# --- README and docs/speed.md ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "docs/speed.md"])
def test_what_is_shown_is_the_committed_result(name: str):
    file = ROOT / name
    section = report.between_markers(file.read_text())
    (path,) = set(re.findall(r"\(([./]*benchmarks/results/[^)]*\.json)\)", section))
    result = json.loads((file.parent / path).read_text())
    assert not result["quick"]
    write = report.readme_section if name == "README.md" else report.page_section
    assert section == write(result, path)
    for picture in re.findall(r"!\[[^]]*\]\(([^)]*)\)", section):
        assert (file.parent / picture).exists()


@pytest.mark.parametrize("option", ["--readme", "--doc"])
def test_the_report_rewrites_what_stands_between_markers(quick: Path, option: str):
    file = quick.with_name("words.md")
    file.write_text(f"before\n\n{report.BEGIN}\n{report.END}\n\nafter\n")
    result = json.loads(quick.read_text())
    result["sections"] = {"ops": result["sections"]["ops"][:2], "step": result["sections"]["step"]}
    path = quick.with_name("short.json")
    path.write_text(json.dumps(result))
    write = report.readme_section if option == "--readme" else report.page_section
    for _ in range(2):  # again changes nothing
        report.main([str(path), option, str(file)])
        words = file.read_text()
        assert words.startswith("before\n\n" + report.BEGIN)
        assert words.endswith(report.END + "\n\nafter\n")
        assert report.between_markers(words) == write(result, path.name)
    with pytest.raises(ValueError, match="markers"):
        report.with_section("no markers", "section")
