"""Choosing λ, or bits: every task decoded with every value of a grid, and scored."""

import math
import numbers as python_numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .errors import ArgumentError
from .file import File

Score = Callable[[str, dict[str, Any]], float]

GRID = (0.2, 0.3, 0.4, 0.5, 0.6)  # the paper's
BITS_GRID = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.3)  # of ternary planes


def check_threshold(value: Any) -> float:
    """λ as a float. Raises ArgumentError where it is not a number of at least 0."""
    try:
        number = math.nan if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < 2.0**127:  # a float32 in the file
        raise ArgumentError(f"threshold must be a number of at least 0, not {value!r}")
    return number


def check_grid(grid: Iterable[float]) -> list[float]:
    """The λ of a grid, ascending, each once. Raises ArgumentError."""
    if isinstance(grid, str) or not isinstance(grid, Iterable):
        raise ArgumentError(f"grid must be a list of thresholds, not {grid!r}")
    values = sorted({check_threshold(value) for value in grid})
    if not values:
        raise ArgumentError("grid is empty: give at least one threshold")
    return values


def trial_name(task: str, value: float) -> str:
    """What a task is called in a file that has it once for every value of a grid."""
    return f"{task} (at {value:g})"


def score_trials(
    file: File, tasks: Iterable[str], grid: list[float], score: Score, out: Mapping[str, Any]
) -> dict[str, list[float]]:
    """The score of every task with every value of a grid, from a file that has all as tasks.

    A task's tensors are the same memory for every value: ``out``'s where it names them. Raises what
    ``score`` raises, ArgumentError where it gives no number or NaN, and what decoding raises.
    """
    scores: dict[str, list[float]] = {}
    for task in tasks:
        names = dict.fromkeys(file.state_dict(trial_name(task, grid[0])))
        state = {name: tensor for name, tensor in out.items() if name in names}
        scores[task] = []
        for value in grid:
            state = file.decode(trial_name(task, value), out=state)
            what = f"score({task!r}, …) at {value:g}"
            scores[task].append(check_score(score(task, state), what))
    return scores


def check_score(value: Any, what: str) -> float:
    """A score as a float. Raises ArgumentError where it is no number, or NaN."""
    if not isinstance(value, python_numbers.Real) and getattr(value, "ndim", None) != 0:
        raise ArgumentError(f"{what} gave {value!r}, not a number")
    number = float(value)
    if math.isnan(number):
        raise ArgumentError(f"{what} gave NaN: scores must be comparable")
    return number


def best(grid: list[float], scores: list[float]) -> float:
    """The λ, of an ascending grid, with the highest score; the smallest of equals."""
    return grid[scores.index(max(scores))]
