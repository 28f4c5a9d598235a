"""What every benchmark needs: where it ran, fair medians, a CSV that says both."""

import csv
import importlib.metadata
import multiprocessing
import os
import platform
import random
import signal
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"


def environment() -> dict:
    """The machine, the commit and the versions a result depends on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("tallcodec", "numpy", "torch")},
    }


def median_of(contenders: dict, repeat: int = 7, warmup: int = 1,
              before: Callable | None = None) -> dict:
    """Median seconds of each callable: {"name": function} -> {"name": seconds}.

    The contenders take turns, so that a busy machine slows all of them alike and their ratios hold,
    in a new order each time, since one finds in the cache what the one before it has left there.
    ``before`` is called with the name before each of them; it takes no part in its time.
    """
    times = {name: [] for name in contenders}
    order, names = random.Random(0), list(contenders)
    for turn in range(warmup + repeat):
        order.shuffle(names)
        for name in names:
            if before:
                before(name)
            start = time.perf_counter()
            contenders[name]()
            elapsed = time.perf_counter() - start
            if turn >= warmup:
                times[name].append(elapsed)
    return {name: statistics.median(samples) for name, samples in times.items()}


def clean_up_when_terminated() -> None:
    """Let SIGTERM end what is running, processes of multiprocessing too, by an exception: temporary
    folders are removed."""
    def leave(number, frame):
        for child in multiprocessing.active_children():
            child.terminate()
        raise SystemExit(128 + number)
    signal.signal(signal.SIGTERM, leave)


def write_csv(path, rows: list) -> None:
    """Write rows (dicts with the same keys), each followed by the environment."""
    rows = [{**row, **environment()} for row in rows]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def print_table(rows: list) -> None:
    """Print rows (dicts with the same keys) as aligned columns."""
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def markdown(rows: list, text: int = 1) -> str:
    """Rows (dicts with the same keys) as a table; the first ``text`` columns are text."""
    lines = [list(rows[0]), ["---"] * text + ["---:"] * (len(rows[0]) - text)]
    lines += [[_cell(value) for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def around(page: Path, name: str) -> tuple[str, str]:
    """What stands before and after the part of a page that a script writes: before
    `<!-- name:begin -->` and after `<!-- name:end -->`."""
    begin, end = _marks(name)
    text = page.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"{page}: the tables go between {begin} and {end}: write them in, once")
    return text.split(begin)[0], text.split(end)[1]


def write_part(page: Path, name: str, text: str) -> None:
    """Replace the part of a page between its marks, and say below it where it was measured."""
    (before, after), (begin, end), where = around(page, name), _marks(name), environment()
    note = (f"{where['cpu']}, {where['cores']} virtual cores, commit {where['commit']}, "
            f"Python {where['python']}, torch {where['torch']}.")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{note}\n\n{end}{after}")


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def _cell(value) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of this tree, with a "+" where files of it have changed since."""
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, check=True,
                              capture_output=True, text=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/",
                      ":(exclude,top)benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
