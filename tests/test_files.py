"What is written appears whole or not at all, and what is read is checked."

import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest
from pydantic import Field
from safetensors import SafetensorError

from linearpatch.workshop.files import *


def test_output_folder(tmp_path):
    with output_folder(tmp_path / "a/b") as partial:
        (partial / "f").write_text("1")
        assert not (tmp_path / "a/b").exists() and partial.parent == tmp_path / "a"
    assert (tmp_path / "a/b/f").read_text() == "1" and os.listdir(tmp_path / "a") == ["b"]
    (tmp_path / "empty").mkdir()
    with output_folder(tmp_path / "empty") as partial:
        (partial / "f").write_text("2")
    assert (tmp_path / "empty/f").read_text() == "2"
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_output_folder_fails(error, tmp_path):
    with pytest.raises(error), output_folder(tmp_path / "a") as partial:
        (partial / "f").write_text("1")
        raise error
    assert os.listdir(tmp_path) == []


def test_output_folder_refuses(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"), output_folder(tmp_path / "file"):
        raise AssertionError
    with pytest.raises(ValueError, match="not empty"), output_folder(tmp_path):
        raise AssertionError


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c(tmp_path):
    code = (
        "import signal, sys, time; from linearpatch.workshop.files import output_folder\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
        "with output_folder(sys.argv[1]) as p: (p / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout.readline() == "ready\n" and len(os.listdir(tmp_path)) == 1
    process.send_signal(signal.SIGINT)
    process.wait(30)
    assert process.returncode != 0 and os.listdir(tmp_path) == []


# -- one file


def test_atomic_file(tmp_path):
    path = tmp_path / "f"
    for text in ("old", "new"):
        with atomic_file(path) as partial:
            partial.write_text(text)
            assert (partial.parent == tmp_path and not path.exists()) or text == "new"
        assert path.read_text() == text
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask and os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), SafetensorError("No space left")])
def test_a_full_disk_keeps_the_old_file(error, tmp_path):
    write_json(tmp_path / "f.json", {"a": 1})
    said = pytest.raises(OSError, match="f.json.*No space left.*finished before is intact")
    with said, atomic_file(tmp_path / "f.json") as partial:
        partial.write_text("{")
        raise error
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "f.json"):
        raise KeyboardInterrupt
    assert read_json(tmp_path / "f.json") == {"a": 1} and os.listdir(tmp_path) == ["f.json"]


@pytest.mark.skipif(os.name != "posix", reason="folders that are synced")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_synced_before_and_after_the_rename(kind, tmp_path, monkeypatch):
    "The data first, then the name, then the folder that lists it."
    done, real = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), real(a, b)))
    if kind == "file":
        with atomic_file(tmp_path / "x") as partial:
            partial.write_text("1")
        written = [tmp_path / "x"]
    else:
        with output_folder(tmp_path / "x") as partial:
            (partial / "f").write_text("1")
        written = [tmp_path / "x" / "f", tmp_path / "x"]
    expected = [p.stat().st_ino for p in written]
    assert done == [*expected, "rename", tmp_path.stat().st_ino]


# -- JSON, hashes, records


@pytest.mark.parametrize("text", ["", "{", "null", "3", '"text"', "[1]", "[" * 100000, "\x00\xff"])
def test_read_json_names_the_file(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="x.json.* (is no valid JSON|and no object)"):
        read_json(path)


def test_hashes(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256(tmp_path / "f") == hashlib.sha256(b"abc").hexdigest()
    a, b = {"x": 1, "y": [1, 2]}, {"y": [1, 2], "x": 1}
    assert json_digest(a) == json_digest(b) != json_digest({"x": 1, "y": [2, 1]})
    assert json_digest(a) == hashlib.sha256(json.dumps(a, sort_keys=True).encode()).hexdigest()


class Inner(Record):
    size: int


class Outer(Record):
    inner: Inner
    names: list[str] = Field(default_factory=list)


@pytest.mark.parametrize(
    "values, said",
    [
        ({}, "inner is missing"),
        ({"inner": {}}, "inner.size is missing"),
        ({"inner": {"size": "3"}}, "inner.size has the wrong type"),
        ({"inner": {"size": True}}, "inner.size has the wrong type"),
        ({"inner": {"size": 3}, "names": ["a", 1]}, "names.1 has the wrong type"),
        ([], "it has the wrong type"),
    ],
)
def test_a_record_names_file_and_field(values, said):
    with pytest.raises(ValueError) as caught:
        parse_record(Outer, values, "f.json is no record", "make it again")
    assert str(caught.value).startswith(f"f.json is no record: {said}")
    assert str(caught.value).endswith("; make it again")


def test_a_record_lets_later_fields_through():
    record = parse_record(Outer, {"inner": {"size": 3}, "colour": "blue"}, "f.json")
    assert record.inner.size == 3 and record.model_dump()["colour"] == "blue"


@pytest.mark.parametrize("version", [None, "1", True, 0, 1.0])
def test_versions(version):
    check_version(1, 1, "f")
    with pytest.raises(ValueError, match="f: .* is no format version"):
        check_version(version, 1, "f")
    with pytest.raises(
        ValueError, match="f has format version 3.*reads up to 2.*newer linearpatch"
    ):
        check_version(3, 2, "f")
