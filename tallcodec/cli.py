"""The `tallcodec` command: encode, add, remove, compact, inspect, decode, merge, stats, verify."""

import argparse
import contextlib
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import encoding, merging, numbers, tasks
from . import file as tall
from .errors import ArgumentError, TallcodecError, label
from .progress import bar
from .stats import stats
from .verify import verify
from .version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 for an error (2 where argparse refuses)."""
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal of ASCII alone is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    try:
        with _terminating(), bar() as arguments.progress:
            result, text = arguments.run(arguments)
    except TallcodecError as error:
        print(f"tallcodec: error: {_printable(str(error))}", file=sys.stderr)
        return 1
    except _Terminated:
        return 143
    except KeyboardInterrupt:
        kept = "; the same command goes on" if getattr(arguments, "resume", False) else ""
        print(f"tallcodec: interrupted{kept}", file=sys.stderr)
        return 130
    if arguments.json:
        text = json.dumps(_finite(result), ensure_ascii=False, indent=1)
    try:
        print(_printable(text), flush=True)
    except BrokenPipeError:  # as under `| head`; Python would complain once more when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


# What a terminal might obey rather than show, and what makes text run backwards.
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def _printable(text: str) -> str:
    """Names and metadata may be a stranger's. What is escaped stays valid JSON."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class _Terminated(BaseException):
    """A request to end: what is half done is cleaned up as after Ctrl-C."""


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    def terminate(*_):
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # in another thread than the main one, which is not told
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tallcodec",
        description="One file for a base model and all its fine-tuned checkpoints.",
    )
    parser.add_argument("--version", action="version", version=f"tallcodec {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, help):
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print JSON instead of text")
        sub.add_argument("--threads", type=int, help="default: one per CPU")
        return sub

    checkpoint = ".safetensors, Hugging Face folder or torch file"
    sub = command("encode", _encode, "Encode fine-tuned checkpoints of one base into one file.")
    sub.add_argument("--base", required=True, help=f"the base checkpoint: {checkpoint}")
    sub.add_argument("--task", action="append", required=True, metavar="NAME=CHECKPOINT",
                     help="a fine-tuned checkpoint; once per task")  # fmt: skip
    sub.add_argument("-o", "--output", required=True, help="the .tall file to write")
    sub.add_argument("--merge", default="task-arithmetic", choices=numbers.MERGES,
                     help="how the shared vector is made (default: %(default)s)")  # fmt: skip
    sub.add_argument("--threshold", action="append", metavar="[NAME=]NUMBER",
                     help="λ of the masks, for all tasks or for one (the others then have "
                     "0.4, as published); default: auto, masks adapted to the weights")  # fmt: skip
    sub.add_argument("--method", action="append", metavar="[NAME=]METHOD",
                     help=f"how tasks are coded, all or one (others: tall): "
                     f"{', '.join(encoding.METHODS)} (default: tall)")  # fmt: skip
    sub.add_argument("--bits", action="append", metavar="[NAME=]NUMBER",
                     help="bits per parameter of ternary planes, of all tasks or of one "
                     f"(default: {encoding.BITS})")  # fmt: skip
    sub.add_argument("--density", type=float,
                     help="the share of each task vector that ties and magnitude masks keep "
                     f"(default: {encoding.DENSITY}), and ternary planes in place of bits")
    sub.add_argument("--scale", default="auto", choices=encoding.SCALES,
                     help="unit-gain keeps the length of a task vector along its own direction, "
                     "by one scale per tensor or row; auto: unit-gain for adapted masks, "
                     "else none")  # fmt: skip
    sub.add_argument("--shared-dtype", default="auto", choices=numbers.SHARED_DTYPES,
                     help="how the shared vector is stored; auto: as the base")  # fmt: skip
    sub.add_argument("--base-storage", default="embed", choices=numbers.BASE_STORAGES,
                     help="reference: leave the base out and ask for it when decoding")  # fmt: skip
    sub.add_argument("--coding", default="auto", choices=encoding.CODINGS,
                     help="of masks and ternary planes; raw: fastest, entropy: smallest; auto: "
                     "masks raw, ternary planes entropy coded")  # fmt: skip
    sub.add_argument("--metadata", action="append", default=[], metavar="KEY=VALUE",
                     help="a string to keep in the file; once per string")  # fmt: skip
    sub.add_argument("--resume", action="store_true",
                     help="keep what is done if it is interrupted, and go on with what was kept")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing file")

    sub = command("add", _add, "Add fine-tuned checkpoints to a file; what is there stays.")
    sub.add_argument("path", help="a .tall file")
    sub.add_argument("--task", action="append", required=True, metavar="NAME=CHECKPOINT",
                     help="a fine-tuned checkpoint; once per task")  # fmt: skip
    sub.add_argument("--base", help=f"the base, where the file only references it: {checkpoint}")
    sub.add_argument("--method", action="append", metavar="[NAME=]METHOD",
                     help="how the new tasks are coded, all or one (others: auto): tall, masks of "
                     "the file's shared vector; ternary; auto, whichever leaves the smaller error "
                     "at equal bits (default: auto)")  # fmt: skip
    sub.add_argument("--threshold", action="append", metavar="[NAME=]NUMBER",
                     help="λ of the masks, for all tasks or for one (the others then have "
                     "0.4, as published); default: auto, masks adapted to the weights")  # fmt: skip
    sub.add_argument("--bits", action="append", metavar="[NAME=]NUMBER",
                     help="bits per parameter of tasks whose --method is ternary, of all or of one "
                     f"(default: {encoding.BITS})")  # fmt: skip
    sub.add_argument("--coding", default="auto", choices=encoding.CODINGS,
                     help="of masks and ternary planes; auto: masks as the file's are, ternary "
                     "planes entropy coded")  # fmt: skip
    sub.add_argument("--rebuild", action="store_true",
                     help="encode all of the file anew, with its own options, from --base and the "
                     "checkpoints of all its tasks and of the new ones")  # fmt: skip

    sub = command("remove", _remove, "Remove tasks from a file; compact then reclaims their space.")
    sub.add_argument("path", help="a .tall file")
    sub.add_argument("--task", action="append", required=True, metavar="NAME",
                     help="a task's name, as inspect shows it; once per task")  # fmt: skip

    sub = command("compact", _compact, "Reclaim the space of removed tasks.")
    sub.add_argument("path", help="a .tall file")

    sub = command("inspect", _inspect, "Show what a file holds and what it costs.")
    sub.add_argument("path", help="a .tall file")

    sub = command("decode", _decode, "Decode a task into a checkpoint.")
    sub.add_argument("path", help="a .tall file")
    sub.add_argument("--task", required=True, help="the task's name, as inspect shows it")
    sub.add_argument("-o", "--output", required=True,
                     help="a .safetensors or .pt file, or a folder to make")  # fmt: skip
    sub.add_argument("--base", help=f"the base, where the file only references it: {checkpoint}")
    sub.add_argument("--max-shard-size", help='split a folder\'s weights, as "5GB"')
    sub.add_argument("--overwrite", action="store_true", help="replace an existing output")

    sub = command("merge", _merge, "Merge the tasks of a file into one checkpoint.")
    sub.add_argument("path", help="a .tall file")
    sub.add_argument("-o", "--output", required=True,
                     help="a .safetensors or .pt file, or a folder to make")  # fmt: skip
    sub.add_argument("--method", default="consensus", choices=merging.METHODS,
                     help="consensus (as published with masks of a --threshold), or how the file's "
                     "shared vector was made, to take it whole (default: %(default)s)")  # fmt: skip
    sub.add_argument("--min-tasks", type=int, default=2,
                     help="consensus: keep what so many tasks use (default: %(default)s)")
    sub.add_argument("--scale", type=float, default=1.0,
                     help="α, the factor of the shared vector (default: %(default)s)")
    sub.add_argument("--base", help=f"the base, where the file only references it: {checkpoint}")
    sub.add_argument("--max-shard-size", help='split a folder\'s weights, as "5GB"')
    sub.add_argument("--overwrite", action="store_true", help="replace an existing output")

    sub = command("stats", _stats, "Show what the masks say: density, agreement, overlap.")
    sub.add_argument("path", help="a .tall file")

    sub = command("verify", _verify, "Check every byte of a file.")
    sub.add_argument("path", help="a .tall file")
    sub.add_argument("--base", help=f"also check that this is the referenced base: {checkpoint}")
    sub.add_argument("--task", action="append", default=[], metavar="NAME=CHECKPOINT",
                     help="also prove that the task decodes to what the file says of it, given "
                     "the checkpoint it was encoded from; may be repeated")  # fmt: skip
    sub.add_argument("--repair-from", metavar="OTHER",
                     help="another copy of the file, or a checkpoint it was encoded from: first "
                     "restore, in place, what is damaged and is sound there")  # fmt: skip
    return parser


def _encode(a: argparse.Namespace) -> tuple[dict, str]:
    tasks = _pairs("--task", a.task)
    info = encoding.encode(
        a.base,
        tasks,
        a.output,
        merge=a.merge,
        threshold=_threshold(a.threshold or ["auto"], tasks),
        method=_per_task("--method", a.method or ["tall"], tasks, "tall", str),
        bits=_bits(a.bits, tasks),
        density=a.density,
        scale=a.scale,
        shared_dtype=a.shared_dtype,
        base_storage=a.base_storage,
        coding=a.coding,
        metadata=_pairs("--metadata", a.metadata),
        threads=a.threads,
        progress=a.progress,
        resume=a.resume,
        overwrite=a.overwrite,
    )
    return info.to_dict(), str(info)


def _add(a: argparse.Namespace) -> tuple[dict, str]:
    new = _pairs("--task", a.task)
    info = tasks.add(
        a.path,
        new,
        base=a.base,
        method=_per_task("--method", a.method or ["auto"], new, "auto", str),
        threshold=_threshold(a.threshold or ["auto"], new),
        bits=_bits(a.bits, new),
        coding=a.coding,
        rebuild=a.rebuild,
        threads=a.threads,
        progress=a.progress,
    )
    return info.to_dict(), str(info)


def _remove(a: argparse.Namespace) -> tuple[dict, str]:
    info = tasks.remove(a.path, a.task)
    return info.to_dict(), str(info)


def _compact(a: argparse.Namespace) -> tuple[dict, str]:
    info = tasks.compact(a.path, threads=a.threads, progress=a.progress)
    return info.to_dict(), str(info)


def _inspect(a: argparse.Namespace) -> tuple[dict, str]:
    with tall.open(a.path, "np", threads=a.threads) as file:
        return file.info.to_dict(), str(file.info)


def _decode(a: argparse.Namespace) -> tuple[dict, str]:
    with tall.open(a.path, "np", a.base, threads=a.threads) as file:
        written = file.save(
            a.task,
            a.output,
            max_shard_size=a.max_shard_size,
            overwrite=a.overwrite,
            progress=a.progress,
        )
    written = [label(path) for path in written]
    return {"task": a.task, "written": written}, "\n".join(written)


def _merge(a: argparse.Namespace) -> tuple[dict, str]:
    info = merging.merge(
        a.path,
        a.output,
        method=a.method,
        min_tasks=a.min_tasks,
        scale=a.scale,
        base=a.base,
        framework="np",
        threads=a.threads,
        max_shard_size=a.max_shard_size,
        overwrite=a.overwrite,
        progress=a.progress,
    )
    return info.to_dict(), str(info)


def _stats(a: argparse.Namespace) -> tuple[dict, str]:
    found = stats(a.path, threads=a.threads, progress=a.progress)
    return found.to_dict(), str(found)


def _verify(a: argparse.Namespace) -> tuple[dict, str]:
    result = verify(
        a.path, a.base, tasks=_pairs("--task", a.task), repair_from=a.repair_from,
        threads=a.threads, progress=a.progress,
    )  # fmt: skip
    return result.to_dict(), str(result)


def _pairs(option: str, values: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise ArgumentError(f"{option} must look like NAME=VALUE, not {text!r}")
        if name in pairs:
            raise ArgumentError(f"{option} names {name!r} twice")
        pairs[name] = value
    return pairs


def _threshold(values: Sequence[str], tasks: dict[str, str]) -> str | float | dict[str, float]:
    if values == ["auto"]:
        return "auto"
    hint = " (a search is for Python: it needs a function)" if "search" in values else ""
    return _numbers("--threshold", values, tasks, 0.4, "auto, a number or NAME=NUMBER", hint)


def _bits(values: Sequence[str] | None, tasks: dict[str, str]) -> Any:
    return values and _numbers("--bits", values, tasks, encoding.BITS, "a number or NAME=NUMBER")


def _numbers(
    option: str, values: Sequence[str], tasks: dict[str, str], default: Any, what: str,
    hint: str = "",
) -> Any:  # fmt: skip
    try:
        return _per_task(option, values, tasks, default, float)
    except ArgumentError:
        raise
    except ValueError as error:
        raise ArgumentError(f"{option} must be {what}: {error}{hint}") from error


def _per_task(
    option: str, values: Sequence[str], tasks: dict[str, str], default: Any, convert: Callable
) -> Any:
    """One value for all, or one per task, where a plain value stands for the tasks not named."""
    plain = [convert(v) for v in values if "=" not in v]
    pairs = _pairs(option, [v for v in values if "=" in v])
    named = {name: convert(value) for name, value in pairs.items()}
    if len(plain) > 1:
        raise ArgumentError(f"{option} is given twice for all tasks")
    return {**dict.fromkeys(tasks, plain[0] if plain else default), **named} if named else plain[0]


def _finite(value):
    """JSON has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


