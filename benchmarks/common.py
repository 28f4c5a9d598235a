"""What every benchmark needs: where it ran, fair medians, a CSV that says both."""

import csv
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def environment() -> dict:
    """The machine, the commit and the versions a result depends on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("tallcodec", "numpy", "torch")},
    }


def median_of(contenders: dict, repeat: int = 7, warmup: int = 1) -> dict:
    """Median seconds of each callable: {"name": function} -> {"name": seconds}.

    The contenders take turns, so that a busy machine slows all of them alike and their ratios hold.
    """
    times = {name: [] for name in contenders}
    for turn in range(warmup + repeat):
        for name, function in contenders.items():
            start = time.perf_counter()
            function()
            elapsed = time.perf_counter() - start
            if turn >= warmup:
                times[name].append(elapsed)
    return {name: statistics.median(samples) for name, samples in times.items()}


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


def _cell(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


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
