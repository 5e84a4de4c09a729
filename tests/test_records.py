"A record is not trusted: every change of it is found, and named."

import json
import os
import shutil

import pytest
from students import *
from tiny import *

from linearpatch.method.models import *
from linearpatch.method.pruning import *
from linearpatch.workshop.checkpoint import *
from linearpatch.workshop.cuts import *
from linearpatch.workshop.patch_files import *
from linearpatch.workshop.records import *

PATCH_EDITS = {
    "newer": (lambda r: r.update(version=2), "format version 2.*install a newer"),
    "version-text": (lambda r: r.update(version="1"), "no format version"),
    "version-none": (lambda r: r.pop("version") and None, "no format version"),
    "format": (lambda r: r.update(format="peft"), "not the description of a patch"),
    "list": (lambda r: [r], "holds a list"),
    "up": (lambda r: r["weights"].update(file="../../x.safetensors"), "lies outside"),
    "absolute": (lambda r: r["weights"].update(file="/etc/passwd"), "lies outside"),
    "dots": (lambda r: r["weights"].update(file=".."), "lies outside|lacks"),
    "number": (lambda r: r["weights"].update(file=3), "weights.file has the wrong type"),
    "missing": (lambda r: r["weights"].update(file="y.safetensors"), "lacks y"),
    "hash": (lambda r: r["weights"].update(sha256="0" * 64), "SHA-256"),
    "no-hash": (lambda r: r["weights"].pop("sha256") and None, "does not describe a patch"),
    "no-base": (lambda r: r.pop("base") and None, "does not describe a patch"),
    "width": (lambda r: r["base"].update(hidden_size=64), r"needs \(64, 64\)"),
    "layers": (lambda r: r["base"].update(n_layers=4), "out of range"),
    "cut": (lambda r: r["patches"][0].update(cut=[3]), "does not describe a patch"),
    "overlap": (lambda r: r["patches"][0].update(cut=[2, 3]), "overlap"),
    "fewer": (lambda r: r["patches"].pop() and None, "no patch asks for"),
    "more": (
        lambda r: r["patches"].insert(2, dict(cut=[3, 4], family="hadamard", info={})),
        "does not describe|lacks",
    ),
    "family": (lambda r: r["patches"][0].update(family=None), "wrong type"),
    "dtype": (lambda r: r.update(dtype="load"), "wrong type"),
    "fingerprint": (lambda r: r["base"].update(fingerprint=None), "wrong type"),
    "bool": (lambda r: r["base"].update(n_layers=True), "wrong type"),
}


@pytest.mark.parametrize("name", PATCH_EDITS)
def test_bad_patch_records(name, copies):
    change, said = PATCH_EDITS[name]
    edit(copies / "patch/linearpatch.json", change)
    with pytest.raises(ValueError, match=said):
        load_patch(copies / "patch")


@pytest.mark.parametrize(
    "text", ["", "{", "null", "3", '"text"', "[" * 100000, "\x00\xff", '{"a": NaN}'], ids=range(8)
)
def test_json_that_is_none(text, copies):
    for file, call in (
        ("patch/linearpatch.json", lambda: load_patch(copies / "patch")),
        ("student/config.json", lambda: load_student(copies / "student")),
        ("student/config.json", lambda: load(copies / "student")),
    ):
        (copies / file).write_text(text, encoding="latin-1")
        with pytest.raises(ValueError):
            call()


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_links_that_lead_out(copies, tmp_path):
    for kind, name, call in (
        ("patch", "patch.safetensors", load_patch),
        ("patch", "linearpatch.json", load_patch),
        ("student", "model.safetensors", load_student),
        ("student", "config.json", load_student),
    ):
        path = copies / kind / name
        outside = copies / "elsewhere"
        outside.write_bytes(path.read_bytes())
        path.unlink()
        path.symlink_to(outside)
        with pytest.raises(ValueError, match="lies outside"):
            call(copies / kind)
        path.unlink()
        path.write_bytes(outside.read_bytes())
        call(copies / kind)
    (copies / "link").symlink_to(copies / "patch")  # a link to the whole folder is the user's own
    assert len(load_patch(copies / "link")) == 3
    cache = tmp_path / "models--me--it"
    (cache / "snapshots").mkdir(parents=True)  # the Hub's cache is made of links
    (cache / "blobs").mkdir()
    (cache / "snapshots/abc").mkdir()
    for p in (copies / "patch").iterdir():
        shutil.move(p, cache / "blobs" / p.name)
        (cache / "snapshots/abc" / p.name).symlink_to(f"../../blobs/{p.name}")
    assert len(load_patch(cache / "snapshots/abc")) == 3


def within(record, **values):
    record["linearpatch"]["model"].update(values)


STUDENT_EDITS = {
    "newer": (lambda c: c["linearpatch"].update(version=2), "format version 2.*install a newer"),
    "version": (lambda c: c["linearpatch"].update(version=0), "no format version"),
    "record-list": (lambda c: c.update(linearpatch=[1]), "no student"),
    "no-model": (
        lambda c: c["linearpatch"].pop("model") and None,
        "save the student again with save_student",
    ),
    "model-list": (lambda c: c["linearpatch"].update(model=[1]), "no student that can be loaded"),
    "layer": (lambda c: c["linearpatch"]["patches"][0].update(layer=9), "no place"),
    "side": (lambda c: c["linearpatch"]["patches"][0].update(side="above"), "no place"),
    "dtype": (lambda c: c["linearpatch"]["patches"][0].update(dtype="load"), "no place"),
    "type": (lambda c: within(c, model_type="no-such"), "no model type"),
    "not-a-model": (lambda c: within(c, architecture="pipeline"), "no model 'pipeline'"),
    "no-name": (lambda c: within(c, architecture="NoSuchModel"), "no model 'NoSuchModel'"),
    "name-type": (lambda c: within(c, architecture=3), "no student that can be loaded"),
    "another-base": (lambda c: within(c, architecture="GPT2LMHeadModel"), "is no 'llama' model"),
    "key": (lambda c: within(c, layers_key="a.b"), "no student that can be loaded"),
    "place": (lambda c: within(c, layers="model.nowhere"), "can be built"),
    "more": (
        lambda c: (c["linearpatch"].update(n_layers=7), within(c, num_hidden_layers=3)) and None,
        "do not fit.*missing",
    ),
    "fewer": (
        lambda c: (
            (c["linearpatch"].update(cuts=[[0, 2], [2, 3], [4, 6]]), within(c, num_hidden_layers=1))
            and None
        ),
        "no place|the cuts leave|can be built",
    ),
    "layers": (lambda c: within(c, num_hidden_layers=5), "the cuts leave 2"),
    "no-patches": (lambda c: c["linearpatch"].update(patches=[]), "do not fit.*unexpected"),
    "one-less": (lambda c: c["linearpatch"]["patches"].pop() and None, "do not fit.*unexpected"),
    "width": (lambda c: within(c, hidden_size=16), "do not fit.*mismatched"),
    "huge": (lambda c: within(c, hidden_size=-1), "width"),
    "remote": (lambda c: within(c, remote=True), "pass trust_remote_code"),
    "vocab": (lambda c: c.update(vocab_size=65), "do not fit.*mismatched"),
}


@pytest.mark.parametrize("name", STUDENT_EDITS)
def test_bad_student_records(name, copies):
    change, said = STUDENT_EDITS[name]
    edit(copies / "student/config.json", change)
    with pytest.raises(ValueError, match=said):
        load_student(copies / "student")


def test_shards_that_lead_out(tmp_path):
    student = student_of()
    save_student(student, tmp_path / "s", max_shard_size="20KB")
    shutil.copy(next((tmp_path / "s").glob("model-*")), tmp_path / "x.safetensors")

    def change(index):
        index["weight_map"][next(iter(index["weight_map"]))] = "../x.safetensors"

    edit(tmp_path / "s/model.safetensors.index.json", change)
    with pytest.raises(ValueError, match="lies outside"):
        load_student(tmp_path / "s")
    (tmp_path / "s/model.safetensors.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(ValueError):
        load_student(tmp_path / "s")


def test_an_adapter_is_no_part_of_a_student(copies):
    (copies / "student/adapter_config.json").write_text(
        '{"base_model_name_or_path": "../base", "peft_type": "LORA"}'
    )
    with pytest.raises(ValueError, match="adapter"):
        load_student(copies / "student")


@pytest.mark.parametrize(
    "old, new",
    [
        ('"n_layers": 6', '"n_layers": 7'),
        ('"dtype"', '"dtype" '),
        ('"family": "hadamard"', '"family": "lstsq"'),
        ("[\n    0,\n    1\n", "[\n    1,\n    2\n"),
    ],
)
def test_an_altered_description_is_refused(copies, old, new):
    path = copies / "patch/linearpatch.json"
    text = path.read_text()
    if old not in text:
        text = text.replace(" ", "").replace("\n", "")
        old, new = (
            x.replace(" ", "").replace("\n", "") for x in (old, new)
        )  # however it is laid out
    assert old in text
    path.write_text(text.replace(old, new, 1))
    if json.loads(path.read_text()) == json.loads(text):
        assert load_patch(copies / "patch")  # only spaces changed
    else:
        with pytest.raises(ValueError, match="altered"):
            load_patch(copies / "patch")
