"""Bytes to bytes: tasks come to a file and go, and what nobody uses any more is left out."""

import json
import struct

import numpy as np

from ..errors import ArgumentError
from .formulas import NEAR, NUMBERS, finite_or_zero
from .reader import Reference
from .records import (
    ABSENT,
    ADAPTED,
    AS_IS,
    CONDITIONAL,
    ENTRY,
    EXTERNAL,
    FILE,
    FILE_RECORD,
    FREE,
    HEADER,
    HEADER_SIZE,
    INDEX,
    MASKED,
    META,
    METHODS,
    NONE,
    NONFINITE_BASE,
    NONFINITE_TASK,
    PLANE,
    SCALE_MODES,
    SCALES,
    SCOPE_BASE,
    SCOPE_FILE,
    SLOT,
    SPARSE,
    TASK,
    TENSOR,
    VERBATIM,
    align64,
    sum_count,
)
from .writer import _classify, _is_finite, _masks, _sparsify, _Writer, pack_slot


def add(data, tasks, *, base=None, method="adapted", thresholds=None, bits=None, density=0.2,
        least_bits=False, coding="auto", task_metadata=None, task_files=None,
        writer="tallcodec 0.1.0", force_zstd=None) -> bytes:
    """A file of `data`, and behind what it has `tasks` (name -> checkpoint).

    method: one, or one by task name, of "tall" (by thresholds, lambda by task name), "adapted" and
    "ternary". base: that of a file which only references it. The other options are those of write;
    coding "auto" takes masks as the file has them.
    """
    model = _Model(data, base)
    if taken := tasks.keys() & {task["name"] for task in model.tasks}:
        raise ArgumentError(f"there already: {taken}")
    methods = method if isinstance(method, dict) else dict.fromkeys(tasks, method)
    model.add_tensors(tasks.values())
    base, states, names = model.file.base_state(), list(tasks.values()), list(model.tensors)
    rule = next((METHODS[m] for m in methods.values() if m != "ternary"), ADAPTED)
    mode = model.head["scale"] or (SCALE_MODES["unit-gain"] if rule == ADAPTED else 0)
    entropy = coding == "entropy" or coding == "auto" and any(
        plane["coding"] == CONDITIONAL for plane in model.planes)
    numbers = [i for i, t in enumerate(model.tensors.values()) if t["alias"] is None]
    codings = {(k, i): _classify(base, state, names[i])
               for k, state in enumerate(states) for i in numbers}
    thresholds = [(bits or {}).get(task, 0) if methods[task] == "ternary" else
                  thresholds[task] if methods[task] == "tall" else NEAR for task in tasks]

    # Masks of the shared vectors that there are; ternary planes of the rest.
    masks, vectors = {}, {}
    for i in numbers:
        tensor = model.tensors[names[i]]
        candidates = [k for k in range(len(states)) if codings[k, i][0] == MASKED]
        masked = [k for k, task in enumerate(tasks) if k in candidates
                  and methods[task] != "ternary" and tensor["shared_dtype"]]
        codings |= {(k, i): (SPARSE, 0) for k in candidates if k not in masked}
        if not masked:
            continue
        b = base[names[i]]
        finite = [k for k in masked if _is_finite(b) and _is_finite(states[k][names[i]])]
        reason = NONFINITE_TASK if _is_finite(b) else NONFINITE_BASE
        codings |= {(k, i): (AS_IS, reason) for k in masked if k not in finite}
        vectors[i] = finite_or_zero(model.file.shared(model.file.tensors[tensor["stored"]]))
        found, _ = _masks(b, {k: states[k][names[i]] for k in finite}, vectors[i], thresholds, mode,
                          rule)
        rows = b.shape[0] if b.ndim > 1 else 1
        unused = bytes(-(-b.size // 8)), bytes(4 * rows * (mode == 2)), {}
        masks |= {(k, i): found.get(k, unused) for k in masked if k in found or not entropy}
    sparse = {}
    for k, task in enumerate(tasks):
        alone = methods[task] == "ternary"
        with np.errstate(all="ignore"):
            sparse |= _sparsify(k, base, states[k], names, codings, thresholds[k] if alone else 1,
                                density, least_bits or not alone, alone)

    # The planes, behind all that there is.
    out = model.open(force_zstd)
    entries = {key: {"coding": kind, "reason": reason} for key, (kind, reason) in codings.items()}
    for (k, i), (mask, row_scales, fields) in sorted(masks.items()):
        used = codings[k, i][0] == MASKED
        entries[k, i] |= fields | {"plane": out.mask(mask, vectors[i], used, entropy),
                                   "scales_plane": out.plane(SCALES, row_scales, used)}
    for (k, i), (signs, fields) in sparse.items():
        entries[k, i] |= fields | {"plane": out.ternary(signs, coding != "raw")}
    for (k, i), (kind, _) in codings.items():
        if kind == AS_IS:
            entries[k, i]["plane"] = out.compressed(VERBATIM, states[k][names[i]].tobytes())
    files = model.file_planes()
    for k, task in enumerate(tasks):
        scope = len(model.tasks) + k
        for name, content in sorted((task_files or {}).get(task, {}).items()):
            if content not in files:
                files[content] = out.compressed(FILE, content)
            model.files.append((scope, name, files[content]))
        model.metas += [(scope, *item) for item in (task_metadata or {}).get(task, {}).items()]

    for k, (task, state) in enumerate(tasks.items()):
        for i, name in enumerate(names):
            entry = entries.get((k, i))
            if entry and entry["coding"] != ABSENT:
                array = state[name]
                entry |= {"dtype": NUMBERS[array.dtype], "shape": array.shape}
            model.tensors[name]["entries"].append(entry)
        model.tasks.append({"name": task, "threshold": thresholds[k],
                            "method": METHODS[methods[task]]})
    model.close(out)
    model.note_merged()
    return model.write(writer)


def remove(data, tasks, *, writer="tallcodec 0.1.0") -> bytes:
    """A file of `data` without these tasks, by name."""
    model = _Model(data)
    kept = [k for k, task in enumerate(model.tasks) if task["name"] not in tasks]
    scopes = {SCOPE_BASE: SCOPE_BASE, SCOPE_FILE: SCOPE_FILE, **{k: n for n, k in enumerate(kept)}}
    model.tasks = [model.tasks[k] for k in kept]
    for tensor in model.tensors.values():
        tensor["entries"] = [tensor["entries"][k] for k in kept]
    model.files = [(scopes[scope], *rest) for scope, *rest in model.files if scope in scopes]
    model.metas = [(scopes[scope], *rest) for scope, *rest in model.metas if scope in scopes]
    model.note_merged()
    return model.write(writer)


def compact(data, *, writer="tallcodec 0.1.0") -> bytes:
    """The file again, without free ranges."""
    model = _Model(data)
    used, body = model.used(), bytearray(HEADER_SIZE)
    for number, plane in enumerate(model.planes):
        if number in used and plane["coding"] != EXTERNAL:
            size = align64(plane["size"])
            body += model.body[plane["offset"] : plane["offset"] + size]
            plane["offset"] = len(body) - size
    index = model.index(writer, used, [])
    head = HEADER.pack(**HEADER.unpack(data)._asdict())
    body[:HEADER_SIZE] = head + pack_slot(head, 1, len(body), index) + bytes(SLOT.size)
    return bytes(body + index)


class _Model:
    """What a file holds, as dicts and lists that can be changed, and its bytes up to its end."""

    def __init__(self, data, base=None):
        self.file = file = Reference(data, base)
        self.body = bytearray(data[: file.slot.file_size])
        self.head = {"base_storage": file.base_storage, "merge": file.merge, "scale": file.scale}
        self.planes = [plane._asdict() | {"sums": self._sums(plane)} for plane in file.planes]
        self.tasks = [{"name": t.name, "threshold": t.threshold, "method": t.method}
                      for t in file.tasks]
        self.tensors = {t.name: self._tensor(i, t) for i, t in enumerate(file.tensors)}
        self.files = [(scope, name, plane) for scope, found in file.files.items()
                      for name, plane in found.items()]
        self.metas = [(scope, key, value) for scope, found in file.metadata.items()
                      for key, value in found.items()]
        self.merged = self._masked()

    def _masked(self):
        return [task["name"] for task in self.tasks if task["method"] != METHODS["ternary"]]

    def note_merged(self):
        """Say whose sum the shared vector is, where that is not of those that have masks of it."""
        masked, known = self._masked(), {key for scope, key, _ in self.metas if scope == SCOPE_FILE}
        if masked and masked != self.merged and "tallcodec.merged" not in known:
            self.metas.append((SCOPE_FILE, "tallcodec.merged", json.dumps(self.merged)))

    def _sums(self, plane):
        size = plane.raw_size if plane.coding == EXTERNAL else plane.size
        return self.file.sums[plane.first_sum :][: sum_count(size)]

    def _tensor(self, number, t):
        alias = None if t.alias == NONE else self.file.tensors[t.alias].name
        fields = {name: getattr(t, name) for name in (
            "in_base", "dtype", "shared_dtype", "base_plane", "shared_plane", "scales_plane")}
        entries = []
        for row in self.file.entries:
            e = row[number]
            entries.append(e and {"coding": ABSENT} if not e or e.coding == ABSENT else
                           e._asdict() | {"shape": self.file.shape(e)})
        masks = sum(bool(e) and e["coding"] == MASKED for e in entries)
        return fields | {"stored": number, "alias": alias, "shape": self.file.shape(t),
                         "counts": self.file.agreement(t), "entries": entries, "masks": masks}

    def add_tensors(self, states):
        """Tensors that only the new tasks have; and those that they have no more tied."""
        for name in {name for state in states for name in state} - self.tensors.keys():
            absent = [{"coding": ABSENT} for _ in self.tasks]
            self.tensors[name] = dict.fromkeys(
                ("in_base", "dtype", "shared_dtype", "masks"), 0) | dict.fromkeys(
                ("base_plane", "shared_plane", "scales_plane"), NONE) | {
                "alias": None, "shape": (), "counts": [], "entries": absent}
        self.tensors = dict(sorted(self.tensors.items()))
        self.untied = []

        def identity(array):
            return None if array is None else (array.dtype, array.shape, array.tobytes())

        for name, t in list(self.tensors.items()):
            target = t["alias"]
            if target and any(identity(state.get(name)) != identity(state.get(target))
                              for state in states):
                original = self.tensors[target]
                self.tensors[name] = original | {"entries": [dict(e) for e in original["entries"]]}
                self.untied.append(name)

    def open(self, force_zstd):
        """A writer of planes behind those there are."""
        out = _Writer(force_zstd)
        out.body, self._first = self.body, len(self.planes)
        out.planes = [b""] * self._first  # so that numbers are those of the model
        return out

    def close(self, out):
        """Takes over what was written; copies the planes of tensors that are no more tied."""
        for record in out.planes[self._first :]:
            plane = PLANE.unpack(record)
            sums = out.sums[plane.first_sum :][: sum_count(plane.size)]
            self.planes.append(plane._asdict() | {"sums": sums})
        self.free = out.free
        for name in self.untied:
            for entry in self.tensors[name]["entries"][: len(self.file.tasks)]:
                if entry["coding"] in (MASKED, SPARSE):
                    entry["plane"] = self._copy(entry["plane"])
                    entry["scales_plane"] = self._copy(entry["scales_plane"])

    def _copy(self, number):
        if number == NONE:
            return NONE
        plane = self.planes[number]
        self.planes.append(plane | {"offset": len(self.body)})
        self.body += self.body[plane["offset"] :][: align64(plane["size"])]
        return len(self.planes) - 1

    def file_planes(self):
        """The planes of small files, by what they hold."""
        return {b"": NONE} | {self.file.file(scope, name): plane
                              for scope, name, plane in self.files if plane != NONE}

    def used(self):
        """The planes that something names, after what nothing needs is gone: shared vectors
        without masks, counts of other masks, tensors of nobody."""
        used = {plane for _, _, plane in self.files}
        for name, t in list(self.tensors.items()):
            codings = [e["coding"] for e in t["entries"] if e]
            if not t["in_base"] and set(codings) <= {ABSENT}:
                del self.tensors[name]
                continue
            if codings.count(MASKED) != t["masks"]:
                t["counts"] = []
            if MASKED not in codings:
                t["shared_dtype"], t["shared_plane"], t["scales_plane"] = 0, NONE, NONE
            if t["alias"] is None:
                used |= {t["base_plane"], t["shared_plane"], t["scales_plane"]}
            for e in t["entries"]:
                if e and e["coding"] != ABSENT:
                    used |= {e.get("plane", NONE), e.get("scales_plane", NONE)}
        return used - {NONE}


    def write(self, writer):
        """The changed file."""
        slot, end = self.file.slot, len(self.body)
        used = self.used()
        free = [(r.offset, r.size) for r in self.file.free] + [(slot.index_offset, slot.index_size)]
        free += getattr(self, "free", [])
        free += [(plane["offset"], align64(plane["size"])) for number, plane in
                 enumerate(self.planes) if number not in used and plane["coding"] != EXTERNAL]
        index = self.index(writer, used, _joined(free))
        data = self.body + index
        other = 128 if data[64:128] == SLOT.pack(**slot._asdict()) else 64
        data[other : other + 64] = pack_slot(bytes(data[:64]), slot.sequence + 1, end, index)
        return bytes(data)

    def index(self, writer, used, free):
        out = _Writer(None)
        order = sorted(used, key=lambda n: (self.planes[n]["coding"] == EXTERNAL, n))
        number = {plane: n for n, plane in enumerate(order)} | {NONE: NONE}
        planes = []
        for n in order:
            plane = self.planes[n]
            fields = {f: plane[f] for f in ("kind", "coding", "offset", "size", "raw_size")}
            planes.append(PLANE.pack(first_sum=len(out.sums), **fields))
            out.sums += plane["sums"]

        head = {**self.head, "writer": out.string(writer)}
        index, place = [], {name: i for i, name in enumerate(self.tensors)}
        for name, t in self.tensors.items():
            fields = {f: t[f] for f in ("in_base", "dtype", "shared_dtype")}
            fields |= {f: number[t[f]] for f in ("base_plane", "shared_plane", "scales_plane")}
            t["dims"] = _dims(out, t["shape"])
            index.append(TENSOR.pack(
                name=out.string(name), dims=t["dims"], rank=len(t["shape"]), **fields,
                alias=NONE if t["alias"] is None else place[t["alias"]],
                first_count=len(out.counts) if t["counts"] else 0, counts=len(t["counts"])))
            out.counts += t["counts"]
        index += [TASK.pack(**task | {"name": out.string(task["name"])}) for task in self.tasks]
        for k in range(len(self.tasks)):
            for t in self.tensors.values():
                index.append(_entry(out, t, t["entries"][k], number))
        index += [*planes, *(FREE.pack(offset=o, size=n) for o, n in free)]
        index += [FILE_RECORD.pack(scope=scope, plane=number[plane], name=out.string(name))
                  for scope, name, plane in sorted(self.files, key=_by_scope)]
        index += [META.pack(scope=scope, key=out.string(key), value=out.string(value))
                  for scope, key, value in sorted(self.metas, key=_by_scope)]
        index += [struct.pack(f"<{len(a)}Q", *a) for a in (out.dims, out.sums, out.counts)]
        head = INDEX.pack(
            tensors=len(self.tensors), tasks=len(self.tasks), planes=len(planes), free=len(free),
            files=len(self.files), metas=len(self.metas), dims=len(out.dims), sums=len(out.sums),
            counts=len(out.counts), strings=len(out.strings), **head)
        index = b"".join([head, *index, out.strings])
        return index.ljust(align64(len(index)), b"\0")


def _entry(out, t, e, number):
    if t["alias"] is not None:
        return ENTRY.pack()
    if e["coding"] == ABSENT:
        return ENTRY.pack(coding=ABSENT, plane=NONE, scales_plane=NONE)
    fields = {"scale": 1, **{f: e[f] for f in e if f in ENTRY.zero}, "rank": len(e["shape"])}
    fields |= {f: number[e.get(f, NONE)] for f in ("plane", "scales_plane")}
    fields["dims"] = _dims(out, e["shape"]) if e["coding"] == AS_IS else t["dims"]
    return ENTRY.pack(**fields)


def _dims(out, shape):
    first = len(out.dims) if shape else 0
    out.dims += shape
    return first


def _by_scope(item):
    scope, key, _ = item
    return {SCOPE_FILE: -2, SCOPE_BASE: -1}.get(scope, scope), key.encode()


def _joined(ranges):
    joined = []
    for offset, size in sorted(ranges):
        if joined and sum(joined[-1]) == offset:
            joined[-1] = joined[-1][0], joined[-1][1] + size
        else:
            joined.append((offset, size))
    return joined
