"""Measures, prints tables, and writes the figures as JSON with plots beside it.

    python -m benchmarks                       the first five, on the GPU if there is one
    python -m benchmarks ops step              some sections, in this order
    python -m benchmarks ops --quick           a function check in seconds; its times mean nothing

Sections:
    ops          every op, size and dtype against every peer, with peak memory
    step         a whole training step of a small VAE
    determinism  what the same bits every time cost, and who gives them
    threads      one thread against two (CPU)
    growth       time over four decades of size
    bandwidth    every op at its largest size, every dtype, against eager alone
    peers        four cases against every peer
    small        sizes at which a call costs more than its work
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from .machine import machine
from .peers import PEERS
from .sections import DEFAULT, SECTIONS, Job, Options
from .tables import header, table
from .timing import Deadline, copy_speed

RESULTS = Path(__file__).parent / "results"
DTYPES = ("float32", "bfloat16", "float16")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "sections",
        nargs="*",
        metavar="SECTION",
        help=f"of {', '.join(SECTIONS)}; default: {', '.join(DEFAULT)}",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--only", metavar="TEXT", default="", help="cases named so: 'masked gaussian 64x3'")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one compilation: a function check")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start nothing new after this time")
    parser.add_argument("--out", type=Path, help="the JSON file (default: under benchmarks/results/)")
    args = parser.parse_args(argv)
    unknown = set(args.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown sections {sorted(unknown)}, expected some of {list(SECTIONS)}")
    if "ours" not in args.peers:
        parser.error("the peers are compared with ours: --peers needs it")
    return args


def default_path(info: dict, quick: bool) -> Path:
    words = [info["processor"].replace(" ", "-").lower()]
    words += [f"{info['threads']}-threads"] if info["device"] == "cpu" else []
    words += [info["date"][:10]] + (["quick"] if quick else [])
    return RESULTS / ("-".join(words) + ".json")


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = Options(device, [getattr(torch, d) for d in args.dtypes], tuple(args.peers), args.quick)
    deadline = Deadline(args.budget)
    torch.manual_seed(0)
    info = machine(device)
    copy = copy_speed(device, options.effort, 4 if args.quick else 256)
    result = {"machine": info, "quick": args.quick, "copy": copy, "skipped": 0, "sections": {}}
    out = args.out or default_path(info, args.quick)
    out.parent.mkdir(parents=True, exist_ok=True)
    print(header(result), flush=True)
    for name in args.sections or DEFAULT:
        rows = result["sections"][name] = []
        for job in progress([job for job in SECTIONS[name](options) if args.only in job.label], name):
            if deadline.passed():
                result["skipped"] += 1
            else:
                rows.append(job.run())
                out.write_text(json.dumps(result, indent=1) + "\n")
        out.write_text(json.dumps(result, indent=1) + "\n")
        if rows:
            print(table(name, rows, copy["bytes_per_second"]), flush=True)
    if result["skipped"]:
        print(f"\n{result['skipped']} cases were not measured: the time budget was over")
    print("\nwrote " + ", ".join(str(p) for p in (out, *plots(result, out))))


def progress(jobs: list[Job], section: str) -> Iterable[Job]:
    """Says which is running: on one line of the terminal, which is gone when the table is printed."""
    try:
        from tqdm import tqdm
    except ImportError:  # a rented machine has not everything
        for job in jobs:
            print(f"{section}: {job.label}", flush=True)
            yield job
        return
    with tqdm(jobs, unit="case", leave=False, dynamic_ncols=True) as bar:
        for job in bar:
            bar.set_description(f"{section}: {job.label}")
            yield job


def plots(result: dict, out: Path) -> list[Path]:
    try:
        from .plots import write_plots
    except ImportError as error:
        print(f"no plots: {error}")
        return []
    return write_plots(result, out)


if __name__ == "__main__":
    main()
