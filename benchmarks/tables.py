"""A result as tables: rows of cells first, then as text or as markdown."""

from __future__ import annotations

import math

Cells = list[list[str]]  # the first row names the columns
GRAPHS = ("ours, graph", "compile, graph")  # replays, compared with each other


def text(cells: Cells) -> str:
    """Aligned columns, words to the left and numbers to the right."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    left = [not any(_is_number(row[i]) for row in cells[1:]) for i in range(len(widths))]
    lines = []
    for row in cells:
        parts = [
            c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(row, widths, left, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def markdown(cells: Cells) -> str:
    lines = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit()


def header(result: dict) -> str:
    info = result["machine"]
    copy = result["copy"]
    return (
        f"{hardware(info)}, torch {info['torch']}, {info['date']}, load {info['load']}\n"
        f"copy of {copy['bytes'] / 2**21:.0f} MiB: {copy['bytes_per_second'] / 1e9:.1f} GB/s read and written"
    )


def hardware(info: dict) -> str:
    if info["device"] != "cpu":
        return info["processor"]
    number = "1 thread" if info["threads"] == 1 else f"{info['threads']} threads"
    return f"{number} of {info['processor']} ({info['build']['cpu_capability']} kernels)"


def size_of(row: dict) -> str:
    return "x".join(map(str, row["size"]))


def ordered(rows: list[dict]) -> list[dict]:
    """Ops in the order of their first appearance, dtypes likewise, then by size."""
    ops = list(dict.fromkeys(row["op"] for row in rows))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    return sorted(rows, key=lambda r: (dtypes.index(r["dtype"]), ops.index(r["op"]), math.prod(r["size"])))


def peers_of(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["peers"]))


def _number(x: float) -> str:
    """Three significant digits without an exponent."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def _time(figures: dict | None) -> str:
    """Microseconds, and half the range of the rounds in percent."""
    if figures is None:
        return ""
    spread = (figures["high"] - figures["low"]) / 2 / figures["median"]
    return f"{_number(figures['median'] * 1e6)} ±{spread:.0%}"


def ratio(row: dict, name: str, base: str = "ours") -> float | None:
    """How many times the time of ``base`` this peer takes."""
    if name not in row["peers"] or base not in row["peers"]:
        return None
    return row["peers"][name]["median"] / row["peers"][base]["median"]


def _ratio(row: dict, name: str, base: str = "ours") -> str:
    value = ratio(row, name, base)
    return "" if value is None else f"{value:.2f}"


def share_of_copy(row: dict, name: str, bytes_per_second: float) -> float:
    """A peer's speed in bytes a perfect kernel moves, over that of the copy."""
    return row["perfect_bytes"] / row["peers"][name]["median"] / bytes_per_second


def _peak(row: dict, name: str) -> str:
    peak = row["peers"].get(name, {}).get("peak_bytes")
    return "" if peak is None else _number(peak / 2**20)


def ops_cells(rows: list[dict], bytes_per_second: float) -> Cells:
    others = [p for p in peers_of(rows) if p != "ours" and p not in GRAPHS]
    graphs = [p for p in GRAPHS if p in peers_of(rows)]
    measured = [p for p in ("ours", *others) if any(_peak(row, p) for row in rows)]
    head = ["op", "size", "dtype", "ours, µs", *(f"{p} / ours" for p in others)]
    head += ["graph, µs", "compile / ours, graphs"] if len(graphs) == 2 else []
    head += ["perfect MB", "GB/s", "of copy", *(f"peak MiB {p}" for p in measured)]
    cells = [head]
    for row in ordered(rows):
        cell = [row["op"], size_of(row), row["dtype"], _time(row["peers"]["ours"])]
        cell += [_ratio(row, p) for p in others]
        if len(graphs) == 2:
            cell += [_time(row["peers"].get(graphs[0])), _ratio(row, graphs[1], graphs[0])]
        share = share_of_copy(row, "ours", bytes_per_second)
        cell += [_number(row["perfect_bytes"] / 1e6), _number(share * bytes_per_second / 1e9), f"{share:.0%}"]
        cells.append(cell + [_peak(row, p) for p in measured])
    return cells


def summary_cells(rows: list[dict], bytes_per_second: float) -> Cells:
    """A line for each op, from the smallest size to the largest: times, the range of each peer's ratio, and
    at the largest size how near the copy's speed, how much faster in bfloat16, and the peak memory."""
    full = [row for row in ordered(rows) if row["dtype"] == "float32"]
    halves = {(row["op"], size_of(row)): row for row in rows if row["dtype"] == "bfloat16"}
    others = [p for p in peers_of(full) if p != "ours" and p not in GRAPHS]
    measured = [p for p in ("ours", *others) if any(_peak(row, p) for row in full)]
    head = ["op", "sizes", "ours, µs", *(f"{p} / ours" for p in others), "of copy", "bfloat16 speed-up"]
    cells = [head + [f"peak MiB {p}" for p in measured]]
    for op in dict.fromkeys(row["op"] for row in full):
        found = [row for row in full if row["op"] == op]
        last = found[-1]
        half = halves.get((op, size_of(last)))
        times = [_number(row["peers"]["ours"]["median"] * 1e6) for row in found]
        cell = [op, _span([size_of(row) for row in found], " to "), _span(times, " to ")]
        for peer in others:
            ratios = sorted(r for row in found if (r := ratio(row, peer)) is not None)
            cell.append(_span([f"{r:.1f}" for r in ratios], " to "))
        cell.append(f"{share_of_copy(last, 'ours', bytes_per_second):.0%}")
        gain = half and last["peers"]["ours"]["median"] / half["peers"]["ours"]["median"]
        cells.append([*cell, f"{gain:.1f}" if gain else "", *(_peak(last, p) for p in measured)])
    return cells


def brief_cells(rows: list[dict]) -> Cells:
    """A line for each op: of its likelihoods the Gaussian where it was measured, of its float32 sizes the one
    in the middle."""
    full = [row for row in ordered(rows) if row["dtype"] == "float32"]
    others = [p for p in peers_of(full) if p != "ours" and p not in GRAPHS]
    found: dict[str, list[dict]] = {}
    for row in full:
        if not row["op"].startswith("half of") and not row["op"].endswith(", forward"):
            found.setdefault(row["op"].split()[0], []).append(row)
    cells = [["op", "size", "ours, µs", *(f"{p} / ours" for p in others)]]
    for op, sizes in found.items():
        name = f"{op} gaussian" if f"{op} gaussian" in {row["op"] for row in sizes} else sizes[0]["op"]
        sizes = [row for row in sizes if row["op"] == name]
        row = sizes[len(sizes) // 2]
        ratios = [ratio(row, peer) for peer in others]
        cells.append(
            [name, size_of(row), _number(row["peers"]["ours"]["median"] * 1e6)]
            + ["" if r is None else f"{r:.1f}" for r in ratios]
        )
    return cells


def _span(words: list[str], between: str) -> str:
    """First and last, or the one there is."""
    return between.join(dict.fromkeys((words[0], words[-1]))) if words else ""


def step_cells(rows: list[dict]) -> Cells:
    peers = peers_of(rows)
    others = [p for p in peers if p != "ours"]
    head = ["step", "images", *(f"{p}, ms" for p in peers), *(f"{p} / ours" for p in others)]
    cells = [head + [f"peak MiB {p}" for p in peers]]
    for row in rows:
        times = [_number(row["peers"][p]["median"] * 1e3) for p in peers]
        cell = [row["op"], size_of(row), *times, *(_ratio(row, p) for p in others)]
        cells.append(cell + [_peak(row, p) for p in peers])
    return cells


def determinism_cells(rows: list[dict]) -> Cells:
    head = [
        "op",
        "size",
        "peer",
        "µs",
        "µs, deterministic mode",
        "results in 10 runs",
        "results, 1 to 3 threads",
    ]
    cells = [head]
    for row in rows:
        for name, figures in row["peers"].items():
            across = figures["distinct_across_threads"]
            cells.append(
                [
                    row["op"],
                    size_of(row),
                    name,
                    _time(figures),
                    _time(figures["deterministic_mode"]),
                    str(figures["distinct_repeated"]),
                    "" if across is None else str(across),
                ]
            )
    return cells


def threads_cells(rows: list[dict]) -> Cells:
    """Times per thread count, and how many times faster than on one."""
    peers = peers_of(rows)
    cells = [["op", "size", "threads", *(f"{p}, µs" for p in peers), *(f"{p}, speed-up" for p in peers)]]
    single = {row["op"]: row["peers"] for row in rows if row["threads"] == 1}
    for row in rows:
        gains = [single[row["op"]][p]["median"] / row["peers"][p]["median"] for p in peers]
        times = [_time(row["peers"][p]) for p in peers]
        cells.append([row["op"], size_of(row), str(row["threads"]), *times, *(f"{g:.2f}" for g in gains)])
    return cells


def slope(small: dict, large: dict, name: str) -> float:
    """d log(time) / d log(elements) from one size to the next: 0 is overhead alone, 1 is work alone."""
    times = large["peers"][name]["median"] / small["peers"][name]["median"]
    return math.log(times) / math.log(math.prod(large["size"]) / math.prod(small["size"]))


def growth_cells(rows: list[dict]) -> Cells:
    peers = peers_of(rows)
    cells = [["op", "elements", *(f"{p}, µs" for p in peers), *(f"{p}, slope" for p in peers)]]
    previous: dict | None = None
    for row in ordered(rows):
        same = previous is not None and previous["op"] == row["op"]
        slopes = [f"{slope(previous, row, p):.2f}" if same else "" for p in peers]
        times = [_time(row["peers"][p]) for p in peers]
        cells.append([row["op"], str(math.prod(row["size"])), *times, *slopes])
        previous = row
    return cells


TITLES = {
    "ops": "Ops, forward + backward but where said (peer / ours above 1: ours is faster)",
    "step": "A training step of a small VAE",
    "determinism": "The cost of determinism",
    "threads": "From one thread to two",
    "growth": "Growth with size, forward + backward",
    "bandwidth": "The largest sizes (peer / ours above 1: ours is faster)",
    "peers": "Every peer (peer / ours above 1: ours is faster)",
    "small": "Small sizes (peer / ours above 1: ours is faster)",
}


def section_cells(name: str, rows: list[dict], bytes_per_second: float) -> Cells:
    if name in ("ops", "bandwidth", "peers", "small"):
        return ops_cells(rows, bytes_per_second)
    cells = {
        "step": step_cells,
        "determinism": determinism_cells,
        "threads": threads_cells,
        "growth": growth_cells,
    }
    return cells[name](rows)


def table(name: str, rows: list[dict], bytes_per_second: float) -> str:
    return f"\n{TITLES[name]}\n{text(section_cells(name, rows, bytes_per_second))}"
