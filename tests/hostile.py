"""Files as a stranger might make them, and everything that is done with a file."""

import os
import random
import subprocess
import sys
import textwrap

import numpy as np

import tallcodec
from editor import Editor
from tallcodec import reference as ref
from tallcodec.errors import TallcodecError, TensorNotFoundError
from tallcodec.reference import records

INTERESTING = (0, 1, 2, 3, 4, 7, 8, 16, 31, 32, 63, 64, 127, 128, 200, 254, 255)


def changed(data, seed):
    """A valid file with a few fields of its index, or bytes of its planes, changed and its
    checksums made right."""
    chance = random.Random(seed)
    editor = Editor(data)
    for _ in range(chance.randint(1, 3)):
        if chance.random() < 0.2 and editor.file.planes:
            p = chance.choice(editor.file.planes)
            if p.coding != records.EXTERNAL:
                editor.data[p.offset + chance.randrange(p.size)] = chance.choice(INTERESTING)
            continue
        at = chance.randrange(editor.start, len(editor.data))
        size = chance.choice((1, 1, 1, 4, 8))
        value = chance.choice((0, 1, (1 << 8 * size) - 1, chance.getrandbits(8 * size),
                               *[x for x in INTERESTING if x < 1 << 8 * size]))  # fmt: skip
        editor.data[at : at + size] = value.to_bytes(size, "little")[: len(editor.data) - at]
    editor.sum_planes()
    return editor.finish()


def use(path, base=None, folder=None):
    """All that the library does with a file; what it refuses is left out. Gives, by task, what it
    decodes of it: name -> bytes, or the class of the error."""
    found = {}
    with tallcodec.open(path, "np", base, threads=1) as file:
        for task in (None, *file.tasks):
            found[task] = found_here = {}
            names = list(file.state_dict(task))
            for name in names:
                found_here[name] = outcome(lambda: file.decode(task, [name])[name])
            for action in (
                lambda: file.load(task).decode(),
                lambda: file.files(task),
                lambda: file.metadata(task),
                lambda: folder and file.save(task, folder, overwrite=True),
            ):
                attempt(action)
        attempt(lambda: (str(file.info), file.info.to_dict()))
    attempt(lambda: (str(tallcodec.stats(path, threads=1)), tallcodec.stats(path).to_dict()))
    attempt(lambda: tallcodec.verify(path, base, threads=1))
    attempt(lambda: tallcodec.merge(path, None, framework="np", base=base))
    return found


def attempt(action):
    try:
        action()
    except TallcodecError as error:
        assert str(error)


def use_reference(data, base=None):
    """The same of the NumPy reader."""
    file = ref.read(data, base)
    found = {None: {}}
    for t in file.tensors:
        own = t if t.alias == records.NONE else file.tensors[t.alias]
        if own.in_base:
            found[None][t.name] = outcome(file._base_tensor, own)
    for task in file.tasks:
        found[task.name] = {n: outcome(file.decode, task.name, n) for n in file.tensor_numbers}
    return found


def outcome(use, *arguments):
    """What it gives, or the class of the error."""
    try:
        return use(*arguments)
    except TallcodecError as error:
        return type(error)


def agree(fast, slow):
    """Whether both readers refuse a file, or make the same of it. NaNs may have any payload, and
    where several things are wrong either may be what is said."""
    if isinstance(fast, type) or isinstance(slow, type):
        return isinstance(fast, type) and isinstance(slow, type)
    if fast.keys() != slow.keys():
        return False
    for task, tensors in slow.items():
        there = {n: t for n, t in tensors.items() if not is_absent(t)}
        if there.keys() != fast[task].keys():
            return False
        for name, tensor in there.items():
            if not same_or_refused(fast[task].get(name), tensor):
                return False
    return True


def is_absent(tensor):
    return tensor is TensorNotFoundError


def same_or_refused(a, b):
    if isinstance(a, type) or isinstance(b, type):
        return isinstance(a, type) and isinstance(b, type)
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if a.tobytes() == b.tobytes():
        return True
    with np.errstate(all="ignore"):
        return a.dtype.kind in "fV" and bool(((a == b) | ((a != a) & (b != b))).all())


def bounded(script, *arguments, mebibytes=100):
    """What a Python script prints that may take so much more address space than importing tallcodec
    and its dependencies does."""
    prelude = """
        import resource, sys
        import numpy as np
        import tallcodec
        from tallcodec import reference
        path, *arguments = sys.argv[1:]
        np.ones(10) @ np.ones(10)
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + (MEBIBYTES << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        def attempt(action):
            try:
                print(action())
            except tallcodec.errors.TallcodecError as error:
                print(type(error).__name__, error)
    """
    code = textwrap.dedent(prelude).replace("MEBIBYTES", str(mebibytes)) + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(os.fspath, arguments)],
        capture_output=True, text=True, timeout=120, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
