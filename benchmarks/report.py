"""Draws a result file again, and writes what README and docs/speed.md say about speed from it.

python -m benchmarks.report RESULT.json                     tables, and plots beside the file
python -m benchmarks.report RESULT.json --readme README.md  also what stands between the README's markers:
                                                            a line for each op
python -m benchmarks.report RESULT.json --doc docs/speed.md the same of the page: all sizes and likelihoods
"""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from .plots import plot_path, write_plots
from .tables import brief_cells, hardware, header, markdown, step_cells, summary_cells, table

BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"


def _paragraph(text: str) -> str:
    return textwrap.fill(text, width=120, break_long_words=False, break_on_hyphens=False)


def readme_section(result: dict, path: str) -> str:
    """The README's words about a result: what was measured and where, and one size of each op."""
    info = result["machine"]
    words = _paragraph(
        f"Forward + backward in float32 on {hardware(info)}, torch {info['torch']}. Ratios are the times of "
        "plain PyTorch and of torch.compile over ours: above 1 ours is faster. Other sizes, memory and a "
        f"whole training step: [speed](docs/speed.md); every figure: [{Path(path).name}]({path})."
    )
    return f"{words}\n\n{markdown(brief_cells(result['sections']['ops']))}"


def page_section(result: dict, path: str) -> str:
    """The page's words about a result: what was measured and where, the plot, and a line for each op and
    likelihood."""
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
            "`python -m benchmarks.report` with that file, which prints every size and all other sections."
        )
    )
    return "\n\n".join(parts)


def between_markers(text: str) -> str:
    return text.split(BEGIN)[1].split(END)[0].strip()


def with_section(text: str, section: str) -> str:
    """The text with the section between its markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the file needs the markers {BEGIN} and {END}, once each")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{section}\n\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("result", type=Path)
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--doc", type=Path)
    args = parser.parse_args(argv)
    result = json.loads(args.result.read_text())
    print(header(result))
    for name, rows in result["sections"].items():
        if rows:
            print(table(name, rows, result["copy"]["bytes_per_second"]))
    write_plots(result, args.result)
    for file, section in ((args.readme, readme_section), (args.doc, page_section)):
        if file:
            path = Path(os.path.relpath(args.result, file.parent)).as_posix()
            file.write_text(with_section(file.read_text(), section(result, path)))


if __name__ == "__main__":
    main()
