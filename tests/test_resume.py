"""encode(resume=True): what is left of an encoding that ends early, and that the next one goes on
with it. tests/cpp/test_resume.cpp interrupts it at every item and at every write."""

import os
import signal
import subprocess
import sys
import time

import pytest

import tallcodec
from helpers import awkward, encoded, names_in, normal, small_family, write_safetensors
from tallcodec import cli
from tallcodec.errors import (
    ArgumentError,
    CheckpointError,
    OutputExistsError,
    ReadError,
    WriteError,
)

LEFT = ["a.tall.partial", "a.tall.partial.journal"]


class Interrupted(Exception):
    pass


class Log(list):
    """A progress function that raises when a step is done, and keeps what it saw."""

    def __init__(self, until=None):
        self.until = until

    def __call__(self, step, done, total):
        self.append((step, done, total))
        if step == self.until and done == total:
            raise Interrupted

    def total(self, step):
        return max((total for name, _, total in self if name == step), default=0)


def save_family(folder, base, tasks):
    for name, state in {"base": base, **tasks}.items():
        write_safetensors(folder / f"{name}.safetensors", state)
    paths = {name: folder / f"{name}.safetensors" for name in tasks}
    return folder / "base.safetensors", paths


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Paths; some tensors have several units, some hold NaN, some are verbatim."""
    base, tasks, _ = awkward(5, big=True)
    return save_family(tmp_path_factory.mktemp("family"), base, tasks)


@pytest.mark.parametrize("options, steps", [
    ({}, ["adapting masks", "encoding"]),
    ({"merge": "ties", "coding": "entropy"}, ["surveying", "encoding", "coding masks"]),
    ({"method": {"cars": "ternary", "dtd": "tall", "aircraft": "ternary"}},
     ["encoding", "looking at magnitudes", "coding ternary planes"]),
])  # fmt: skip
def test_it_goes_on(family, tmp_path, options, steps):
    base, tasks = family
    expected = encoded(tmp_path / "expected.tall", base, tasks, **options)
    output = tmp_path / "a.tall"
    for step in steps:
        with pytest.raises(Interrupted):
            tallcodec.encode(base, tasks, output, resume=True, progress=Log(step), **options)
        assert names_in(tmp_path) == [*LEFT, "expected.tall"]
    log = Log()
    info = tallcodec.encode(base, tasks, output, resume=True, progress=log, **options)
    assert info.path.endswith("a.tall")
    assert output.read_bytes() == expected
    assert names_in(tmp_path) == ["a.tall", "expected.tall"]
    assert log.total("verifying") > 0 and log.total("surveying") == 0
    assert log.total("encoding") < 10  # only what held NaN was not done


def check_resumed(family, folder):
    """A file comes out as without resume, and nothing else is left."""
    expected = encoded(folder / "b.tall", *family)
    assert encoded(folder / "a.tall", *family, resume=True) == expected
    assert names_in(folder) == ["a.tall", "b.tall"]


def test_without_an_interruption(family, tmp_path):
    check_resumed(family, tmp_path)


def test_an_old_output_stays_until_then(family, tmp_path):
    base, tasks = family
    output = tmp_path / "a.tall"
    output.write_bytes(b"old")
    with pytest.raises(OutputExistsError):
        tallcodec.encode(base, tasks, output, resume=True)
    assert names_in(tmp_path) == ["a.tall"]
    with pytest.raises(Interrupted):
        tallcodec.encode(base, tasks, output, resume=True, overwrite=True, progress=Log("encoding"))
    assert output.read_bytes() == b"old"
    tallcodec.encode(base, tasks, output, resume=True, overwrite=True)
    tallcodec.verify(output)


def interrupt(base, tasks, output, **options):
    with pytest.raises(Interrupted):
        tallcodec.encode(base, tasks, output, resume=True, progress=Log("encoding"), **options)


def test_other_options_or_checkpoints_leave_it_alone(family, tmp_path):
    base, tasks = save_family(tmp_path, *small_family())
    output = tmp_path / "a.tall"
    interrupt(base, tasks, output, threshold=0.4)
    kept = [(tmp_path / name).read_bytes() for name in LEFT]
    others = [
        (tasks, {"threshold": 0.5}, "the options"),
        (tasks, {"threshold": 0.4, "scale": "unit-gain"}, "the options"),
        ({**tasks, "third": tasks["cars"]}, {"threshold": 0.4},
         "the tasks or their order, the options, task 'third'"),
        (dict(reversed(tasks.items())), {"threshold": 0.4}, "the tasks or their order, the opt"),
    ]  # fmt: skip
    for them, options, what in others:
        message = f"a.tall.partial is of an encoding of other .* differs: {what}"
        with pytest.raises(ArgumentError, match=message):
            tallcodec.encode(base, them, output, resume=True, **options)
    write_safetensors(tasks["cars"], small_family(("x",))[1]["x"])
    with pytest.raises(ArgumentError, match="differs: task 'cars'. To"):
        tallcodec.encode(base, tasks, output, resume=True, threshold=0.4)
    assert kept == [(tmp_path / name).read_bytes() for name in LEFT]
    info = tallcodec.encode(base, tasks, output, threshold=0.4)  # without resume, as ever
    assert info.tasks and kept == [(tmp_path / name).read_bytes() for name in LEFT]


def test_what_is_damaged_is_done_again(family, tmp_path):
    base, tasks = family
    expected = encoded(tmp_path / "expected.tall", base, tasks)
    output, partial = tmp_path / "a.tall", tmp_path / LEFT[0]
    for damage in (lambda data: data[: len(data) // 2], lambda data: b"\1" * len(data),
                   lambda data: data[:5000] + b"x" + data[5001:], lambda data: b""):  # fmt: skip
        interrupt(base, tasks, output, overwrite=True)
        partial.write_bytes(damage(partial.read_bytes()))
        assert encoded(output, base, tasks, resume=True) == expected


def test_state_dicts_are_refused(tmp_path):
    base, tasks = small_family()
    for score in ({}, {"threshold": "search", "score": lambda *_: pytest.fail("searched")}):
        with pytest.raises(ArgumentError, match="only checkpoints in files"):
            tallcodec.encode(base, tasks, tmp_path / "a.tall", resume=True, **score)
    assert names_in(tmp_path) == []


def test_where_it_cannot_be_written(tmp_path):
    base, tasks = save_family(tmp_path, *small_family())
    before = names_in(tmp_path)
    with pytest.raises(WriteError, match="there is no folder"):
        tallcodec.encode(base, tasks, tmp_path / "none" / "a.tall", resume=True)
    with pytest.raises(CheckpointError):
        tallcodec.encode(base, {"t": {"other": normal(3)}}, tmp_path / "a.tall")
    write_safetensors(tmp_path / "x.safetensors", {"other": normal(3)})
    with pytest.raises(CheckpointError, match="is that its base"):
        tallcodec.encode(base, {"t": tmp_path / "x.safetensors"}, tmp_path / "a.tall", resume=True)
    with pytest.raises(ArgumentError, match="cannot be met"):
        tallcodec.encode(base, tasks, tmp_path / "a.tall", resume=True, method="ternary", bits=1e-6)
    (tmp_path / "x.safetensors").unlink()
    assert before == names_in(tmp_path)


@pytest.mark.parametrize("make", [
    lambda path, base: path.symlink_to(base),  # nothing is written through a link
    lambda path, base: path.hardlink_to(base),
    lambda path, base: os.mkfifo(path),
    lambda path, base: path.mkdir(),
    lambda path, base: path.write_bytes(b"somebody else's"),
], ids=["link", "hard link", "pipe", "folder", "file"])  # fmt: skip
def test_what_is_not_ours_is_left_alone(tmp_path, make):
    base, tasks = save_family(tmp_path, *small_family())
    make(tmp_path / LEFT[0], base)
    before = names_in(tmp_path), base.read_bytes()
    with pytest.raises(WriteError):
        tallcodec.encode(base, tasks, tmp_path / "a.tall", resume=True)
    assert before == (names_in(tmp_path), base.read_bytes())
    if (tmp_path / LEFT[0]).is_file():
        assert (tmp_path / LEFT[0]).read_bytes() in (b"somebody else's", base.read_bytes())


def test_starting_anew(family, tmp_path):
    """As the message says: by removing the partial."""
    interrupt(*family, tmp_path / "a.tall", threshold=0.4)
    (tmp_path / LEFT[0]).unlink()
    check_resumed(family, tmp_path)


def test_killed_before_the_last_link_is_gone(family, tmp_path):
    """The output is complete then, and has the partial's name too."""
    base, tasks = family
    output = tmp_path / "a.tall"
    expected = encoded(output, base, tasks)
    (tmp_path / LEFT[0]).hardlink_to(output)
    (tmp_path / LEFT[1]).write_bytes(b"tallcodec journal 1\nof it")
    with pytest.raises(OutputExistsError):
        tallcodec.encode(base, tasks, output, resume=True)
    with pytest.raises(Interrupted):
        tallcodec.encode(base, tasks, output, resume=True, overwrite=True, progress=Log("encoding"))
    assert output.read_bytes() == expected
    assert encoded(output, base, tasks, resume=True) == expected


def test_two_at_once(family, tmp_path):
    base, tasks = family

    def again(*_):
        with pytest.raises(WriteError, match="another process is writing it"):
            tallcodec.encode(base, tasks, tmp_path / "a.tall", resume=True)

    tallcodec.encode(base, tasks, tmp_path / "a.tall", resume=True, progress=again)
    tallcodec.verify(tmp_path / "a.tall")


def test_an_input_that_changes_meanwhile(tmp_path):
    base, tasks = save_family(tmp_path, *small_family())

    def touch(*_):
        os.utime(tasks["cars"], ns=(0, 0))

    with pytest.raises(ReadError, match="written to while"):
        tallcodec.encode(base, tasks, tmp_path / "a.tall", resume=True, progress=touch)
    assert not (tmp_path / "a.tall").exists()
    with pytest.raises(ArgumentError, match="of other checkpoints"):
        tallcodec.encode(base, tasks, tmp_path / "a.tall", resume=True)


@pytest.mark.parametrize("options", [[], ["--coding", "entropy"], ["--method", "ternary"]])
def test_killed_at_any_moment(tmp_path, options):
    """By the system, later each time, until it is done: from the command line."""
    base = {f"w{i}": normal((700, 1000), i) for i in range(4)}
    tasks = {t: {n: w + normal(w.shape, 9, spread=0.01) for n, w in base.items()} for t in "ab"}
    path, tasks = save_family(tmp_path, base, tasks)
    command = [sys.executable, "-m", "tallcodec", "encode", "--base", path, *options,
               *(f"--task={name}={task}" for name, task in tasks.items()), "-o"]  # fmt: skip
    subprocess.run([*command, tmp_path / "expected.tall"], check=True, capture_output=True)
    delay = 0.15
    while not (tmp_path / "a.tall").exists():
        process = subprocess.Popen([*command, tmp_path / "a.tall", "--resume"],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
        time.sleep(delay)
        process.kill()
        assert process.communicate()[1] == b""
        assert process.returncode in (0, -signal.SIGKILL)
        delay *= 1.06
    assert (tmp_path / "a.tall").read_bytes() == (tmp_path / "expected.tall").read_bytes()
    # Between the file's appearance and the end there may be a journal left.
    assert not (tmp_path / LEFT[0]).exists()


def test_command_line(tmp_path, capsys):
    base, tasks = save_family(tmp_path, *small_family())
    output = tmp_path / "a.tall"
    interrupt(base, tasks, output)
    arguments = ["encode", "--base", str(base), "-o", str(output), "--resume"]
    arguments += [f"--task={name}={path}" for name, path in tasks.items()]
    assert cli.main([*arguments, "--threshold", "0.4"]) == 1
    assert "remove it" in capsys.readouterr().err
    assert cli.main(arguments) == 0
    assert not [name for name in LEFT if (tmp_path / name).exists()]
