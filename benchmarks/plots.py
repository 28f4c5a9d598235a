"""The plots of quality.py and encoding.py, as small SVG files."""

import matplotlib
from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

STYLES = {  # kind of method: colour, marker
    "reference": ("#555555", "s"), "merged": ("#a06a00", "D"),
    "TALL": ("#0a58ca", "o"), "rival": ("#c0264b", "^"),
}
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "tallcodec", "font.size": 9,
            "axes.spines.top": False, "axes.spines.right": False}
FLOOR = 1e-3  # of KL left: what is less, or nothing, is drawn here
MODELS = 1, 1.2, 1.5, 2, 3, 5, 8, 12, 20, 40
PLACES = [(radius * dx, radius * dy)  # of numbers beside their points, in printer's points
          for radius in (9, 14, 20, 27, 35)
          for dx, dy in ((1, 0), (-1, 0), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7),
                         (0, 1), (0, -1))]


def plot(rows: list[dict], path, title: str) -> None:
    """KL left and gap recovered against size in one-model multiples; rows are numbered."""
    with matplotlib.rc_context(SETTINGS):
        rows = [row for row in rows if row["method"] != "base"]
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
        losses = [max(row["kl_left"], FLOOR) for row in rows]
        left.set(yscale="log", ylabel="KL left (log; 0 drawn at .1 %)")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
        left.yaxis.set_minor_locator(NullLocator())
        gaps = [max(row["gap_recovered"], -0.1) for row in rows]
        right.set(ylabel="gap recovered (less than −.1 drawn there)")
        right.axhline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
        for axes, values in ((left, losses), (right, gaps)):
            _points(axes, rows, values)
        handles = [Line2D([], [], linestyle="", color=STYLES[row["kind"]][0], markersize=4.5,
                          marker=STYLES[row["kind"]][1]) for row in rows]
        labels = [f"{i}  {row['method']}" for i, row in enumerate(rows, 1)]
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8,
                      handletextpad=0.2, labelspacing=0.35)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        figure.canvas.draw()  # settles the layout, which the numbers' places depend on
        for axes, values in ((left, losses), (right, gaps)):
            _numbers(axes, rows, values)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def plot_scaling(rows: list[dict], sweep: str, path) -> None:
    """Seconds against parameters or tasks, each file and number of threads with its line."""
    labels = {"parameters": "parameters, in millions, of each of 5 checkpoints",
              "tasks": "tasks of 25 M parameters"}
    styles = {1: ("o", "-"), 2: ("^", "--")}  # by threads
    with matplotlib.rc_context(SETTINGS):
        figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
        series = {}
        for row in rows:
            series.setdefault((row["file"], row["threads"]), []).append(row)
        colours = dict(zip(dict.fromkeys(file for file, _ in series), ("#0a58ca", "#c0264b")))
        for (file, threads), points in series.items():
            unit = 1e6 if sweep == "parameters" else 1
            x = [row[sweep] / unit for row in points]
            marker, dashes = styles[threads]
            fitted = [points[0]["start"] + points[0]["slope"] * unit * place for place in x]
            axes.plot(x, fitted, dashes, color=colours[file], linewidth=0.8)
            axes.plot(x, [row["seconds"] for row in points], marker, color=colours[file],
                      markersize=4.5, label=f"{file}, {threads} thread{'s'[:threads - 1]}")
        axes.set(xlabel=labels[sweep], ylabel="seconds", xlim=0, ylim=0)
        axes.grid(color="#eeeeee", zorder=0)
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def _points(axes, rows: list[dict], values: list[float]) -> None:
    for row, value in zip(rows, values):
        colour, marker = STYLES[row["kind"]]
        axes.scatter(row["models"], value, s=26, color=colour, marker=marker, linewidths=0,
                     zorder=2)
    most = max(row["models"] for row in rows)
    axes.set(xscale="log", xlim=(0.95, most * 1.15),
             xlabel="all of it, base included, in one-model multiples (log)")
    axes.set_xticks([x for x in MODELS if x <= most * 1.1])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(color="#eeeeee", zorder=0)


def _numbers(axes, rows: list[dict], values: list[float]) -> None:
    """Each row's number where it hides neither a point nor a number, with a line if that is far."""
    pixels = axes.transData.transform([(row["models"], v) for row, v in zip(rows, values)])
    points = pixels * 72 / axes.figure.dpi
    numbers = []
    for i, (row, value, (x, y)) in enumerate(zip(rows, values, points), 1):
        def free(place):
            u, v = x + place[0], y + place[1]
            return (all(abs(u - a) > 8 or abs(v - b) > 7 for a, b in points)
                    and all(abs(u - a) > 11 or abs(v - b) > 8.5 for a, b in numbers))
        dx, dy = next(filter(free, PLACES), PLACES[0])
        numbers.append((x + dx, y + dy))
        line = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.5, "shrinkA": 3, "shrinkB": 2}
        axes.annotate(str(i), (row["models"], value), (dx, dy), textcoords="offset points",
                      ha="center", va="center", fontsize=7.5, color=STYLES[row["kind"]][0],
                      arrowprops=line if abs(dx) + abs(dy) > 12.8 else None)
