"""The small file that test_reference.py reads and test_validation.py edits."""

import functools

import numpy as np

from families import THRESHOLDS
from helpers import same
from tallcodec import reference as ref

F32 = np.float32


def same_state(a, b):
    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def sample():
    """One tensor of each kind, as small as can be."""
    rng = np.random.default_rng(0)

    def values(*shape):
        return rng.standard_normal(shape).astype(F32)

    base = {
        "empty": values(0, 3),
        "equal": values(2),
        "head": values(2, 2),
        "inf": values(5),
        "mask": values(3, 50),
        "nan": values(130),
        "scalar": np.array(F32(5)),
        "verbatim": np.arange(3),
    }
    base["tied"] = base["mask"].copy()
    tasks = {
        name: {n: a + a.dtype.type(k) for n, a in base.items()} | {"equal": base["equal"]}
        for k, name in ((1, "cars"), (2, "dtd"))
    }
    tasks["cars"]["nan"][7] = np.nan
    tasks["cars"]["inf"][0] = tasks["dtd"]["inf"][0] = np.inf
    tasks["cars"]["head"] = values(1, 2)
    tasks["dtd"]["extra"] = np.zeros(600, F32)
    del tasks["dtd"]["verbatim"]
    return base, tasks


@functools.cache
def sample_file(**options):
    options = {
        "scale": "unit-gain-row",
        "shared_dtype": "int8",
        "thresholds": THRESHOLDS,
        "metadata": {"odd": "é \x07 a/b c\\d ..", "k": "v"},
        "base_files": {"config.json": b"{}" * 9, "vocab": b""},
    } | options
    return ref.write(*sample(), **options)
