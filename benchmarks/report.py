"""Draws a result file again, and writes the README's part about speed from it.

python -m benchmarks.report RESULT.json                      tables, and plots beside the file
python -m benchmarks.report RESULT.json --readme README.md   also what stands between the README's markers
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from .plots import plot_path, write_plots
from .tables import hardware, header, markdown, step_cells, summary_cells, table

BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"


def _paragraph(text: str) -> str:
    return textwrap.fill(text, width=120, break_long_words=False, break_on_hyphens=False)


def readme_section(result: dict, path: str) -> str:
    """The README's words about a result: what was measured and where, the plot, and a line for each op."""
    info, speed = result["machine"], result["copy"]["bytes_per_second"]
    parts = [
        _paragraph(
            f"Forward + backward in float32 on {hardware(info)}, torch {info['torch']}, "
            f"{info['date'][:10]}; medians of rounds that are interleaved in one run, after checking every "
            "peer's results and gradients. Ratios above 1: ours is faster; the range is over sizes. The last "
            "columns are for the largest size; *of copy* is the speed in bytes that a perfect kernel would "
            f"move, relative to a large copy in the same run ({speed / 1e9:.0f} GB/s, read and written)."
        ),
        markdown(summary_cells(result["sections"]["ops"], speed)),
        f"![time against size, by op and peer]({plot_path(Path(path), 'time').as_posix()})",
    ]
    steps = result["sections"].get("step")
    if steps:
        parts += ["A whole training step of a small VAE with Adam:", markdown(step_cells(steps))]
    parts.append(
        _paragraph(
            f"Measured by `python -m benchmarks` into [{Path(path).name}]({path}), and written here by "
            f"`python -m benchmarks.report {path} --readme README.md`, which prints every size and the other "
            "sections too."
        )
    )
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
