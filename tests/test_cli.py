"""The command: what it prints and returns; its options are Python's arguments by their names."""

import inspect
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tallcodec
from helpers import names_in, normal, small_family, write_safetensors
from tallcodec.cli import _parser, main

pytest.importorskip("torch")  # the checkpoints of these tests are written with it

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def folder(checkpoints, monkeypatch):
    monkeypatch.chdir(checkpoints)
    return checkpoints


ENCODE = ["encode", "--base", "base.safetensors", "--task", "cars=cars.safetensors",
          "--task", "dtd=dtd/", "-o", "vision.tall"]  # fmt: skip


@pytest.fixture
def vision(folder):
    tasks = {"cars": "cars.safetensors", "dtd": "dtd"}
    tallcodec.encode("base.safetensors", tasks, "vision.tall")
    return folder / "vision.tall"


def run(capsys, *arguments):
    """What a command prints, which must succeed, and print nothing to stderr."""
    status = main(list(arguments))
    output = capsys.readouterr()
    assert (status, output.err) == (0, "")
    return output.out


def refused(capsys, *arguments):
    """The message of a command that must fail, in one line and without a traceback."""
    assert main(list(arguments)) == 1
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("tallcodec: error: ")
    assert output.err.count("\n") == 1
    return output.err


def unusable(capsys, *arguments):
    """The message of arguments that the command cannot make sense of."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_the_four_commands(capsys, folder):
    printed = run(capsys, *ENCODE)
    assert "vision.tall" in printed and "cars" in printed and "dtd" in printed
    assert run(capsys, "inspect", "vision.tall") == printed
    printed = run(capsys, "decode", "vision.tall", "--task", "cars", "-o", "cars-again.safetensors")
    assert printed == "cars-again.safetensors\n"
    assert "vision.tall" in run(capsys, "verify", "vision.tall")

    from safetensors.numpy import load_file

    with tallcodec.open("vision.tall", "np") as file:
        for name, array in load_file("cars-again.safetensors").items():
            assert array.tobytes() == file.decode("cars", [name])[name].tobytes()


def test_json(capsys, vision):
    with tallcodec.open("vision.tall") as file:
        expected = json.loads(json.dumps(file.info.to_dict()))
    encoded = json.loads(run(capsys, *ENCODE, "--overwrite", "--json"))
    assert encoded == json.loads(run(capsys, "inspect", "vision.tall", "--json")) == expected
    assert [task["name"] for task in encoded["tasks"]] == ["cars", "dtd"]
    decoded = run(capsys, "decode", "vision.tall", "--task", "dtd", "-o", "again", "--json")
    assert json.loads(decoded) == {
        "task": "dtd", "written": [f"again/{n}" for n in ("model.safetensors", "config.json",
                                                          "vocab.txt")]}  # fmt: skip
    verified = json.loads(run(capsys, "verify", "vision.tall", "--json"))
    assert verified["bytes"] == vision.stat().st_size and verified["tasks"] == 2


def test_json_has_no_nan(capsys, folder):
    """Nothing is coded: gain, error and density are NaN, which JSON lacks."""
    write_safetensors("same.safetensors", small_family()[0])
    printed = run(capsys, "encode", "--base", "base.safetensors", "--task", "a=same.safetensors",
                  "-o", "x.tall", "--json")  # fmt: skip

    def refuse(constant):
        raise AssertionError(constant)

    task = json.loads(printed, parse_constant=refuse)["tasks"][0]
    assert task["gain"] is task["error"] is task["density"] is None


def test_the_command_makes_the_file_that_python_makes(capsys, folder):
    options = {"merge": "task-arithmetic", "method": "tall", "scale": "unit-gain-row",
               "shared_dtype": "int8", "base_storage": "reference", "threads": 1}  # fmt: skip
    tasks = {"cars": "cars.safetensors", "dtd": "dtd"}
    tallcodec.encode("base.safetensors", tasks, "python.tall", threshold={"cars": 0.7, "dtd": 0.3},
                     metadata={"a": "1=2", "b": "x"}, **options)  # fmt: skip
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    run(capsys, *ENCODE, *arguments, "--threshold", "0.3", "--threshold", "cars=0.7",
        "--metadata", "b=x", "--metadata", "a=1=2")  # fmt: skip
    assert Path("vision.tall").read_bytes() == Path("python.tall").read_bytes()


def options_of(command):
    """The options of a command by the names their values have in Python."""
    sub = _parser()._subparsers._group_actions[0].choices[command]
    return {action.dest: action for action in sub._actions}


def test_bits_of_all_tasks_or_of_one(checkpoints, tmp_path, capsys):
    def encode(*bits):
        options = [f"--task={name}={checkpoints / checkpoint}"
                   for name, checkpoint in (("a", "cars.safetensors"), ("b", "dtd"))]  # fmt: skip
        return main(["encode", "--base", str(checkpoints / "base.safetensors"), *options,
                     "-o", str(tmp_path / "x.tall"), "--overwrite", "--method", "ternary",
                     *bits])  # fmt: skip

    assert encode("--bits", "2") == 0
    assert [t.threshold for t in tallcodec.open(tmp_path / "x.tall").info.tasks] == [2, 2]
    assert encode("--bits", "a=2", "--bits", "3") == 0
    assert [t.threshold for t in tallcodec.open(tmp_path / "x.tall").info.tasks] == [2, 3]
    capsys.readouterr()
    wrong = {"a=much": "--bits must be a number or NAME=NUMBER", "c=2": "unknown: ['c']"}
    for bits, message in wrong.items():
        assert encode("--bits", bits) == 1
        assert message in capsys.readouterr().err


def test_options_bear_the_names_of_pythons_arguments():
    encode = inspect.signature(tallcodec.encode).parameters
    options = options_of("encode")
    # Searches for λ or bits, and progress, call a function, which the command line cannot give.
    functions = {"target", "score", "grid", "out", "progress"}
    assert encode.keys() - options.keys() == functions | {"tasks"}
    assert "task" in options
    assert options.keys() - encode.keys() == {"help", "json", "task"}
    choices = ("merge", "bits", "density", "scale", "shared_dtype", "base_storage")
    for name in (*choices, "overwrite"):
        assert options[name].default == encode[name].default
    for name in (*choices, "threads"):
        assert f"--{name.replace('_', '-')}" in options[name].option_strings
    python = {**inspect.signature(tallcodec.File.save).parameters,
              **inspect.signature(tallcodec.open).parameters}  # fmt: skip
    assert options_of("decode").keys() - python.keys() == {"help", "json", "output"}
    python = inspect.signature(tallcodec.verify).parameters
    assert options_of("verify").keys() - python.keys() == {"help", "json", "task"}


@pytest.mark.parametrize("command", ["encode", "inspect", "decode", "verify"])
def test_every_command_takes_json_and_threads(command):
    assert {"json", "threads"} <= options_of(command).keys()


def test_thresholds(capsys, folder):
    def thresholds(*values):
        options = [option for value in values for option in ("--threshold", value)]
        info = json.loads(run(capsys, *ENCODE, "--overwrite", "--json", *options))
        assert {task["method"] for task in info["tasks"]} == {"tall"}
        return [task["threshold"] for task in info["tasks"]]

    assert thresholds("0.3") == [0.3, 0.3]
    assert thresholds("dtd=0.2") == [0.4, 0.2]
    assert thresholds("dtd=0.2", "1", "cars=0") == [0, 0.2]

    for auto in ([], ["--threshold", "auto"]):
        info = json.loads(run(capsys, *ENCODE, "--overwrite", "--json", *auto))
        assert [task["method"] for task in info["tasks"]] == ["adapted"] * 2
        assert info["scale"] == "unit-gain"
    assert "auto" in refused(capsys, *ENCODE, "--overwrite", "--threshold", "low")
    assert "auto" in refused(capsys, *ENCODE, "--overwrite", *auto, "--threshold", "0.4")


def test_decode_to_shards(capsys, vision):
    run(capsys, "decode", "vision.tall", "--task", "dtd", "-o", "out", "--max-shard-size", "1kB")
    assert len(list(Path("out").glob("*.safetensors"))) > 1


def test_referenced_base(capsys, folder):
    run(capsys, *ENCODE, "--base-storage", "reference")
    decode = ["decode", "vision.tall", "--task", "cars", "-o", "again.safetensors"]
    assert "only references its base" in refused(capsys, *decode)
    assert not Path("again.safetensors").exists()
    assert "a.bias" in refused(capsys, *decode, "--base", "cars.safetensors")
    run(capsys, *decode, "--base", "base.safetensors")
    run(capsys, "verify", "vision.tall")
    run(capsys, "verify", "vision.tall", "--base", "base.safetensors")
    assert "a.bias" in refused(capsys, "verify", "vision.tall", "--base", "cars.safetensors")


@pytest.mark.parametrize("options, match", [
    (["--task", "cars=dtd"], "--task names 'cars' twice"),
    (["--task", "dtd"], "NAME=.*'dtd'"),
    (["--task", "=dtd"], "NAME="),
    (["--threshold", "nan"], "threshold.*nan"),
    (["--threshold", "-1"], "threshold.*-1"),
    (["--threshold", "x"], "--threshold.*'x'"),
    (["--threshold", "boats=1"], "boats"),
    (["--threshold", "1", "--threshold", "2"], "twice"),
    (["--threshold", "cars=1", "--threshold", "cars=2"], "'cars' twice"),
    (["--metadata", "k"], "--metadata.*'k'"),
    (["--threads", "0"], "threads.*0"),
    (["--task", "gone=gone.safetensors"], "gone.safetensors: no such file"),
    (["--base", "gone.safetensors"], "gone.safetensors: no such file"),
    (["-o", "gone/x.tall"], "gone/x.tall"),
    (["-o", "dtd"], "dtd: is an input"),
    (["-o", "."], ".: exists"),
])  # fmt: skip
def test_encode_refuses(capsys, folder, options, match):
    before = sorted(os.listdir())
    assert re.search(match, refused(capsys, *ENCODE, *options))
    assert sorted(os.listdir()) == before


def test_output_exists(capsys, vision):
    before = vision.read_bytes()
    assert "vision.tall: exists" in refused(capsys, *ENCODE)
    Path("again.pt").write_bytes(b"mine")
    decode = ["decode", "vision.tall", "--task", "cars", "-o", "again.pt"]
    assert "again.pt: exists" in refused(capsys, *decode)
    assert vision.read_bytes() == before and Path("again.pt").read_bytes() == b"mine"
    run(capsys, *decode, "--overwrite")
    run(capsys, *ENCODE, "--overwrite")


def test_bad_files_and_names(capsys, vision):
    assert "gone.tall" in refused(capsys, "inspect", "gone.tall")
    assert "cars.safetensors: not a .tall file" in refused(capsys, "verify", "cars.safetensors")
    decode = ["decode", "vision.tall", "-o", "x.safetensors", "--task"]
    assert "no task 'boats'; it has 'cars', 'dtd'" in refused(capsys, *decode, "boats")
    vision.write_bytes(vision.read_bytes()[:-64])
    assert "vision.tall: truncated" in refused(capsys, "inspect", "vision.tall")


def test_arguments_that_make_no_sense(capsys):
    assert "COMMAND" in unusable(capsys)
    assert "--base" in unusable(capsys, "encode", "--task", "a=b", "-o", "x")
    assert "'wrong'" in unusable(capsys, *ENCODE, "--scale", "wrong")
    assert "--treads" in unusable(capsys, "verify", "vision.tall", "--treads", "2")


def test_version_and_help(capsys):
    for option, expected in (("--version", tallcodec.__version__), ("--help", "encode")):
        with pytest.raises(SystemExit) as caught:
            main([option])
        assert caught.value.code == 0 and expected in capsys.readouterr().out


def test_ctrl_c(capsys, vision, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tallcodec.cli.verify", interrupt)
    assert main(["verify", "vision.tall"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", [
    [sys.executable, "-m", "tallcodec"], [str(Path(sys.executable).with_name("tallcodec"))]],
    ids=["python -m", "script"])  # fmt: skip
def test_as_a_process(vision, command):
    if not Path(command[0]).exists():
        pytest.skip("the script is not installed beside this Python")
    env = os.environ | {"PYTHONPATH": str(ROOT)}

    def process(*arguments):
        return subprocess.run([*command, *arguments], capture_output=True, text=True, env=env,
                              check=False)  # fmt: skip

    done = process("inspect", "vision.tall", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["bytes"] == vision.stat().st_size
    done = process("inspect", "gone.tall")
    assert (done.returncode, done.stdout) == (1, "") and "Traceback" not in done.stderr


def test_a_reader_that_stops_reading(vision):
    """As `tallcodec inspect vision.tall | head -0` does."""
    read, write = os.pipe()
    os.close(read)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "tallcodec", "inspect", "vision.tall"], env=env,
                          stdout=write, stderr=subprocess.PIPE, text=True, check=False)  # fmt: skip
    os.close(write)
    assert done.returncode != 0 and "Traceback" not in done.stderr


def test_file_names_that_are_no_utf8(capsys):
    name = os.fsdecode(b"caf\xe9.tall")
    run(capsys, *ENCODE[:-1], name)
    assert "caf" in run(capsys, "inspect", name)
    assert "caf" in run(capsys, "inspect", name, "--json")
    decoded = os.fsdecode(b"\xe9.safetensors")
    run(capsys, "decode", name, "--task", "cars", "-o", decoded)
    run(capsys, "decode", name, "--task", "cars", "-o", decoded, "--overwrite", "--json")
    assert "caf" in refused(capsys, "decode", name, "--task", "boats", "-o", "x.pt")


def test_terminated(tmp_path):
    """As after Ctrl-C, nothing is left."""
    base = {f"w{i}": normal((1000, 1000), i) for i in range(8)}
    write_safetensors(tmp_path / "base.safetensors", base)
    write_safetensors(tmp_path / "t.safetensors", {n: w + np.float32(1) for n, w in base.items()})
    before = names_in(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "tallcodec", "encode", "--base", tmp_path / "base.safetensors",
         "--task", f"t={tmp_path / 't.safetensors'}", "-o", tmp_path / "a.tall", "--threads", "1",
         "--coding", "entropy"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    while names_in(tmp_path) == before and process.poll() is None:
        time.sleep(0.001)
    process.terminate()
    assert process.communicate()[1] == b""
    assert process.returncode == 143
    assert names_in(tmp_path) == before
