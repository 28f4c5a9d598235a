"""Wrote the golden files, once. A file that exists is never written again.

Each file is small (under 4 KiB) and shows a few features of the format; `expected.json` holds what
they decode to: dtype, shape and SHA-256 of every tensor, found by the NumPy reference. A new
version of the format, or a new feature, gets files of its own, named by their version.

    python tests/golden/make.py
"""

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np

from tallcodec import reference

FOLDER = Path(__file__).parent


def values(n, seed, dtype=np.float32, shape=None):
    """Small numbers without a random generator: the same for ever."""
    i = np.arange(n, dtype=np.int64)
    whole = (i * i * (7 + 2 * seed) + 13 * seed * i + seed) % 61 - 30
    return (whole / 64).astype(dtype).reshape(shape or (n,))


def task(base, seed):
    """A fine-tuned version of a tensor."""
    change = values(base.size, seed + 3, np.float32, base.shape) / 16
    return (base.astype(np.float32) + change).astype(base.dtype)


def families():
    """Name, base, one or two tasks, and options of reference.write."""
    w = values(130, 1, shape=(10, 13))
    nan = task(w, 4)
    nan[0, 0] = np.nan
    tied = {"embed": w, "head": w}
    scalar, empty = np.array(0.5, np.float32), np.empty((0, 3), np.float32)

    yield "float32", {"a": w, "b": values(9, 2)}, [
        {"a": task(w, 1), "b": task(values(9, 2), 1)},
        {"a": task(w, 2), "b": values(9, 2)},
    ], {"metadata": {"who": "golden"}, "task_metadata": {"dtd": {"format": "pt"}}}  # fmt: skip
    for dtype in (np.float16, ml_dtypes.bfloat16):
        b = values(135, 1, dtype, (9, 15))
        yield np.dtype(dtype).name, {"a": b}, [{"a": task(b, 1)}, {"a": task(b, 2)}], {}
    yield "int8-shared-row-scales", {"a": w, "v": values(5, 1)}, [
        {"a": task(w, k), "v": task(values(5, 1), k)} for k in (1, 2)
    ], {"shared_dtype": "int8", "scale": "unit-gain-row"}  # fmt: skip
    yield "unit-gain-mixed-dtypes", {"a": w}, [
        {"a": task(w, 1).astype(np.float16)}, {"a": task(w, 2).astype(ml_dtypes.bfloat16)},
    ], {"scale": "unit-gain", "shared_dtype": "bfloat16"}  # fmt: skip
    yield "referenced-base", {"a": w, "b": values(9, 2)}, [
        {"a": task(w, 1), "b": values(9, 2)}, {"a": task(w, 2), "b": values(9, 2)},
    ], {"base_storage": "reference"}  # fmt: skip
    yield "tied-and-absent", tied | {"x": values(7, 3)}, [
        {"embed": task(w, 1), "head": task(w, 1), "x": values(7, 4)},
        {"embed": task(w, 2), "head": task(w, 2)},
    ], {}  # fmt: skip
    yield "verbatim-shapes", {"a": w}, [
        {"a": values(26, 3, shape=(2, 13)), "head": values(6, 1)},
        {"a": task(w, 2), "head": values(4, 2, np.float16, (2, 2))},
    ], {}  # fmt: skip
    yield "nan-leaves-a-free-range", {"a": w}, [{"a": nan}, {"a": task(w, 2)}], {}
    yield "zero-dims", {"empty": empty, "scalar": scalar}, [
        {"empty": empty, "scalar": np.array(0.75, np.float32)},
        {"empty": np.empty((0, 4), np.float32), "scalar": scalar},
    ], {}  # fmt: skip
    for part, numbers in (("integers", range(16, 25)), ("floats", range(32, 39))):
        state = {}
        for number in numbers:
            dtype = reference.formulas.DTYPES[number]
            state[dtype.name] = np.arange(1, 4).astype(dtype)
        if part == "integers":
            state["int64"] = np.array([16777217, -1, 1 << 60])
        changed = {name: array[::-1].copy() for name, array in state.items()}
        yield f"{part}-verbatim", state, [changed], {}
    files = {"config.json": b'{"a": 1}' * 40, "vocab.txt": b"x\ny\n"}
    yield "files-zstd", {"a": values(9, 1)}, [{"a": task(values(9, 1), 1)}] * 2, {
        "base_files": files, "task_files": {"dtd": files | {"empty.txt": b""}},
    }  # fmt: skip

    two = [{"a": task(w, 1), "v": task(values(9, 2), 1)}, {"a": task(w, 2), "v": values(9, 2)}]
    for name, options in (
        ("adapted", {"method": "adapted", "scale": "unit-gain"}),
        ("ties", {"merge": "ties"}),
        ("average-magnitude", {"merge": "average", "method": "magnitude", "density": 0.3}),
    ):
        yield name, {"a": w, "v": values(9, 2)}, two, options

    half = values(300, 3).astype(ml_dtypes.bfloat16)
    base = {"a": w, "h": half, "n": values(9, 4), "z": np.zeros(4, np.float32)}
    sparse = [
        {"a": task(w, k), "h": task(half, k), "n": task(values(9, 4), k), "z": -base["z"]}
        for k in (1, 2)
    ]
    sparse[1]["n"][3] = np.nan
    yield "ternary", base, sparse, {"method": "ternary", "bits": {"cars": 1.5}, "density": 0.2}
    methods = {"cars": "ternary", "dtd": "adapted"}
    few = [{name: state[name] for name in "ah"} for state in (base, *sparse)]
    yield "ternary-and-masks", few[0], few[1:], {
        "method": methods, "bits": {"cars": 0.6}, "scale": "unit-gain",
    }  # fmt: skip

    yield "raw-ternary", few[0], few[1:], {"method": "ternary", "bits": {"cars": 0.6},
                                            "density": 0.2, "coding": "raw"}  # fmt: skip
    # Long enough to be worth coding; an eighth of it changes in one task, all of it in the other.
    long = {"a": values(1400, 5, ml_dtypes.bfloat16, (14, 100)), "v": values(9, 2)}
    part = long["a"].copy()
    part[3:5] = task(part, 1)[3:5]
    yield "coded-masks", long, [
        {"a": part, "v": task(long["v"], 1)}, {"a": task(long["a"], 2), "v": task(long["v"], 2)},
    ], {"method": "adapted", "scale": "unit-gain-row", "shared_dtype": "int8",
        "base_storage": "reference", "coding": "entropy"}  # fmt: skip


def changed():
    """Name, bytes and base of files to which tasks came and from which they went. A task that comes
    unties a tensor and has a head; another one is ternary; one that goes had a file like another's.
    """
    b, v = values(21, 1, shape=(3, 7)), values(5, 2)
    base = {"a": b, "b": v, "tied": v}
    tasks = {k: base | {"a": task(b, n), "b": task(v, n), "tied": task(v, n)}
             for n, k in enumerate(("cars", "dtd", "sun397"), 1)}  # fmt: skip
    cars, dtd, sun397 = ({name: state} for name, state in tasks.items())
    options = {"method": "adapted", "scale": "unit-gain", "shared_dtype": "int8",
               "writer": "tallcodec 0.1.0"}  # fmt: skip
    file = {"vocab.txt": b"x\ny\n"}
    parted = {"dtd": dtd["dtd"] | {"tied": task(v, 5), "head": values(3, 1)}}
    added = reference.add(reference.write(base, cars, **options), parted)
    yield "v1-added", added, None
    two = reference.write(base, cars | dtd, task_files={"cars": file, "dtd": file}, **options)
    yield "v1-removed", reference.remove(two, ["cars"]), None
    yield "v1-removed-from-the-sum", reference.remove(two, ["dtd"]), None
    ternary = reference.add(added, sun397, method="ternary", bits={"sun397": 2})
    yield "v1-compacted", reference.compact(reference.remove(ternary, ["cars"])), None
    options |= {"base_storage": "reference"}
    yield "v1-added-to-referenced-base", reference.add(
        reference.write(base, cars, **options), dtd, base=base), base  # fmt: skip


def build():
    """Name, bytes, and the base where the file only references it."""
    thresholds = {"cars": 0.4, "dtd": 0.5}
    for name, base, states, options in families():
        tasks = dict(zip(thresholds, states))
        data = reference.write(
            base,
            tasks,
            thresholds={t: thresholds[t] for t in tasks},
            writer="tallcodec 0.1.0",
            **options,
        )
        yield f"v1-{name}", data, base if options.get("base_storage") == "reference" else None
    yield from changed()


def describe(data, base):
    file = reference.read(data, base)
    state = {"base": file.base_state()} if base is None else {}
    state |= {f"task {task.name}": file.task_state(task.name) for task in file.tasks}
    return {
        owner: {
            name: [array.dtype.name, list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]
            for name, array in tensors.items()
        }
        for owner, tensors in state.items()
    }


if __name__ == "__main__":
    manifest = FOLDER / "expected.json"
    expected = json.loads(manifest.read_text()) if manifest.exists() else {}
    for name, data, base in build():
        path = FOLDER / f"{name}.tall"
        if path.exists():
            print(f"{path.name}: exists, left as it is")
            continue
        path.write_bytes(data)
        expected[name] = {"bytes": len(data), "decoded": describe(data, base)}
        print(f"{path.name}: {len(data)} bytes")
    manifest.write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")
