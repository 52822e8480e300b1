"""Draws a result file again, and writes the README's part about speed from it.

python -m benchmarks.report RESULT.json                      tables, and plots beside the file
python -m benchmarks.report RESULT.json --readme README.md   also what stands between the README's markers
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from .plots import plot_path, write_plots
from .tables import Cells, header, markdown, ops_cells, step_cells, table

BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"


def _without(cells: Cells, columns: set[str]) -> Cells:
    keep = [i for i, name in enumerate(cells[0]) if name not in columns]
    return [[row[i] for i in keep] for row in cells]


def readme_section(result: dict, path: str) -> str:
    """The README's words about a result: what was measured and where, the plot, and the float32 tables."""
    info, speed = result["machine"], result["copy"]["bytes_per_second"]
    where = info["processor"]
    if info["device"] == "cpu":
        where = f"{info['threads']} threads of an {where} ({info['build']['cpu_capability']} kernels)"
    rows = [row for row in result["sections"]["ops"] if row["dtype"] == "float32"]
    cells = _without(ops_cells(rows, speed), {"dtype", "perfect MB", "GB/s"})
    parts = [
        f"Forward + backward in float32 on {where}, torch {info['torch']}, {info['date'][:10]}: medians ± "
        "half the range of the rounds, which are interleaved in one run. Above 1, ours is faster. *Of copy* is "
        "the speed in bytes that a perfect kernel would move, relative to a large copy in the same run "
        f"({speed / 1e9:.0f} GB/s, read and written); small operands stay in the cache and can pass 100 %. "
        f"Every number, other dtypes and the remaining sections: [{Path(path).name}]({path}), from which "
        f"`python -m benchmarks.report {path} --readme README.md` writes these lines.",
        f"![time against size, by op and peer]({plot_path(Path(path), 'time').as_posix()})",
        markdown(cells),
    ]
    if result["sections"].get("step"):
        parts += [
            "A whole training step of a small VAE with Adam:",
            markdown(step_cells(result["sections"]["step"])),
        ]
    return "\n\n".join(parts)


def between_markers(readme: str) -> str:
    return readme.split(BEGIN)[1].split(END)[0].strip()


def with_section(readme: str, section: str) -> str:
    """The README with the section between its markers."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"the README needs the markers {BEGIN} and {END}, once each")
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n\n{section}\n\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("result", type=Path)
    parser.add_argument("--readme", type=Path)
    args = parser.parse_args(argv)
    result = json.loads(args.result.read_text())
    print(header(result))
    for name, rows in result["sections"].items():
        if rows:
            print(table(name, rows, result["copy"]["bytes_per_second"]))
    write_plots(result, args.result)
    if args.readme:
        path = args.result.resolve().relative_to(args.readme.resolve().parent).as_posix()
        args.readme.write_text(with_section(args.readme.read_text(), readme_section(result, path)))


if __name__ == "__main__":
    main()
