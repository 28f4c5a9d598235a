"""Small awkward families of checkpoints: every row of design.md's "What each tensor becomes"."""

import ml_dtypes
import numpy as np

ARITHMETIC = [np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16)]
OTHERS = [np.dtype(t) for t in (
    np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.bool_,
    np.float64, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fnuz,
    ml_dtypes.float8_e5m2fnuz, ml_dtypes.float8_e8m0fnu, np.complex64)]

# Nothing, less than a byte of mask, one, more; around a block of 128 scales; several with a rest.
SIZES = [0, 1, 7, 8, 127, 128, 129, 530]
SHAPES = [(), (1, 1), (3, 5), (7, 33), (5, 129), (3, 2, 67), (4, 0), (1, 260), (260, 1)]
BIG = 600_001  # elements: more than a unit of 524,288, and masks of more than 65,536 bytes

THRESHOLDS = {"cars": 0.4, "dtd": 0.2, "aircraft": 0.6, "sun397": 0.0, "mnist": 1.0}


def family(seed=0, tasks=3, big=False):
    """(base, tasks): dicts of NumPy arrays by tensor name, and those by task name. `big` adds a few
    tensors of more than one unit."""
    rng = np.random.default_rng(seed)
    names = list(THRESHOLDS)[:tasks]
    base, states = {}, {name: {} for name in names}

    def values(shape, spread=1.0):
        return np.asarray(rng.standard_normal(shape) * spread, np.float32)

    def tune(array, k):
        """A task's version of an array: small changes to most elements, none to some."""
        change = values(array.shape, 0.1) * (rng.random(array.shape) < 0.8)
        return (array.astype(np.float32) + change).astype(array.dtype)

    def add(name, array, of_task=tune):
        base[name] = array
        for k, state in enumerate(states.values()):
            state[name] = np.asarray(of_task(array, k))  # arithmetic on 0-d gives scalars

    def tuned_as(dtype):
        return lambda array, k: tune(array, k).astype(dtype)

    def cast(dtype):
        return lambda array, k: array.astype(dtype)

    def only(first, then=lambda array, k: array.copy()):
        """`first` makes the first task's tensor, `then` every other's."""
        return lambda array, k: (then if k else first)(array, k)

    # The common case: arithmetic, one shape, different values.
    for dtype in ARITHMETIC:
        for shape in [*((n,) for n in SIZES), *SHAPES]:
            label = "x".join(map(str, shape)) or "scalar"
            add(f"layer.{dtype}.{label}", values(shape).astype(dtype))
    add("large.int8 scales", values((3, 300), 1e-3) * np.float32(1e4) ** values((3, 300)))

    # Another element type in the tasks, or in some; values equal to the base's in it.
    for dtype in ARITHMETIC:
        other = ARITHMETIC[(ARITHMETIC.index(dtype) + 1) % 3]
        add(f"mixed.{dtype}.all", values((3, 43)).astype(dtype), tuned_as(other))
        add(f"mixed.{dtype}.one", values(77).astype(dtype), only(tuned_as(other), tune))
        add(f"mixed.{dtype}.equal", np.ones(9, dtype), only(cast(other)))
    add("mixed.empty", np.zeros((0, 3), np.float32), only(cast(np.float16)))
    add("mixed.verbatim", values(10), only(cast(np.float64)))

    # Equal to the base, in all tasks or in some.
    add("equal.all", values((4, 9)), lambda a, k: a.copy())
    add("equal.some", values((4, 9)), only(tune))

    # Not arithmetic: never averaged. 16777217 is no float32.
    for dtype in OTHERS:
        bits = rng.integers(0, 2 if dtype == np.bool_ else 256, (600, dtype.itemsize), np.uint8)
        array = bits.view(dtype)[:, 0]
        add(f"verbatim.{dtype}", array, lambda a, k: np.roll(a, k))
    add("verbatim.step", np.array(16777217), lambda a, k: a + k)
    add("verbatim.compressible", np.arange(5000) // 7, lambda a, k: a + k)

    # Another shape, absent from the base, absent from a task.
    add("head.weight", values((10, 8)), lambda a, k: values((3 + k, 8)))
    add("head.bias", values(10), lambda a, k: values(3 + k))
    add("head.scalar", values(1), only(lambda a, k: a.reshape(())))
    add("head.empty", values(2), only(lambda a, k: a[:0]))
    for k, name in enumerate(names):
        states[name][f"extra.{name}"] = values((2, k + 1))
        states[name]["extra.shared name"] = values(k + 2).astype(ARITHMETIC[k % 3])
    states[names[0]]["extra.empty"] = np.zeros((2, 0), np.float32)
    add("missing.one", values(20))
    add("missing.all", values(20))
    del states[names[0]]["missing.one"]
    for state in states.values():
        del state["missing.all"]

    # Tied: three names of one tensor; one tied in the base alone; a pair that a task lacks.
    add("tied.a", values((6, 7)))
    add("tied.lone", values(12))
    base["tied.lone 2"] = base["tied.lone"].copy()
    for state in (base, *states.values()):
        state["tied.b"], state["tied.c"] = state["tied.a"].copy(), state["tied.a"].copy()
    for k, state in enumerate(states.values()):
        state["tied.lone 2"] = tune(base["tied.lone 2"], k)
    add("tied.gap", values(9))
    base["tied.gap 2"] = base["tied.gap"].copy()
    for state in list(states.values())[1:]:
        state["tied.gap 2"] = state["tied.gap"].copy()
    del states[names[0]]["tied.gap"]

    # NaN and infinity, in some tasks, in all, in the base; free ranges of planes and of scales.
    def spoilt(value):
        def spoil(array, k):
            array = tune(array, k)
            array.reshape(-1)[array.size // 2] = value
            return array
        return spoil

    for dtype in ARITHMETIC:
        add(f"nonfinite.{dtype}.one", values((3, 100)).astype(dtype), only(spoilt(np.nan), tune))
        add(f"nonfinite.{dtype}.all", values((3, 100)).astype(dtype), spoilt(-np.inf))
        add(f"nonfinite.{dtype}.base", spoilt(np.inf)(values(200).astype(dtype), 0), tune)
    add("nonfinite.equal", spoilt(np.nan)(values(5), 0), lambda a, k: a.copy())

    # Values at the edges: -0 and denormals, what overflows a sum, the shared type or the result.
    def multiples(unit, factors, size=300):
        return np.float32(unit) * rng.choice(np.float32(factors), size)

    for dtype in ARITHMETIC:
        info = ml_dtypes.finfo(dtype)
        for label, unit, factors in (("denormal", info.smallest_subnormal, range(-9, 10)),
                                     ("huge", info.max, [-1, -0.5, 0, 0.5, 1])):
            versions = [multiples(unit, factors).astype(dtype) for _ in range(tasks + 1)]
            add(f"edge.{dtype}.{label}", versions[0], lambda a, k, v=versions: v[k + 1])
        add(f"edge.{dtype}.zeros", np.array([0.0, -0.0, 0.0, -0.0, 1.0], dtype),
            lambda a, k: np.roll(a, k) if k else -a)
    add("edge.overflow", np.full(40, 3e38, np.float32), lambda a, k: (-1) ** k * a)
    add("edge.narrowed", values(300, 1e5).astype(np.float32),
        lambda a, k: np.clip(tune(a, k), -6e4, 6e4).astype(np.float16))
    add("edge.tiny int8 scale", np.zeros(300, np.float32),
        lambda a, k: multiples(1e-45, range(-90, 90), a.shape))
    add("edge.cancelled", values(64), lambda a, k: a + np.float32(1 if k % 2 else -1))
    add("name.ünïcode/β 𝛾", values(3))
    add("", values(2))

    if big:
        add("big.flat", values(BIG))
        add("big.rows", values((3, BIG // 3)).astype(ml_dtypes.bfloat16))
        add("big.many rows", values((1201, 501)).astype(np.float16))
        add("big.nonfinite", values(BIG), only(spoilt(np.nan), tune))
        add("big.verbatim", rng.integers(0, 255, BIG, np.uint8), lambda a, k: a[::-1].copy())
    return base, states


def reference_options():
    """Every combination of the options that change a file's values."""
    for scale in ("none", "unit-gain", "unit-gain-row"):
        for shared_dtype in ("auto", "float32", "bfloat16", "float16", "int8"):
            for storage in ("embed", "reference"):
                yield {"scale": scale, "shared_dtype": shared_dtype, "base_storage": storage}
