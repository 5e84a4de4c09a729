"Text: every source, and every refusal."

import dataclasses
import gzip
import json
import subprocess
import sys

import datasets
import pytest

from linearpatch.workshop import texts
from linearpatch.workshop.texts import CORPORA, Corpus, load_text

alphabet = "abcdefghijklmnopqrstuvwxyz"


def test_passages():
    calibration, heldout = load_text("passages"), load_text("passages", split="heldout")
    assert sum(len(t.split()) for t in calibration + heldout) >= 15_000
    assert len(calibration) > len(heldout) >= 4
    assert not set(calibration) & set(heldout)
    with pytest.raises(ValueError, match="no split 'test'.*calibration"):
        load_text("passages", split="test")


def test_files(tmp_path):
    plain, lines, wrong, png, utf16 = (
        tmp_path / n for n in ("a.txt", "a.jsonl", "b.jsonl", "a.png", "u.txt")
    )
    plain.write_bytes("\ufeffGrüße, Welt.".encode())
    lines.write_text('{"text": "one"}\n\n{"text": "two", "id": 2}\n')
    wrong.write_text('{"txt": "one"}\n')
    png.write_bytes(b"\x89PNG\r\n\x00\x01")
    utf16.write_text("Some text.", encoding="utf-16")
    assert load_text(plain) == load_text(str(plain)) == ["Grüße, Welt."]
    assert load_text(lines) == ["one", "two"]
    with pytest.raises(ValueError, match="JSON-lines"):
        load_text(wrong)
    for path in (png, utf16):
        with pytest.raises(ValueError, match=f"{path.name} is no plain text"):
            load_text(path)
    with pytest.raises(ValueError, match="is a folder"):
        load_text(tmp_path)
    with pytest.raises(
        ValueError,
        match="neither a known corpus nor a file: give one of passages, wikitext2, c4, ptb",
    ):
        load_text("wikitext")


@pytest.mark.parametrize(
    "name, split, path, contains",
    [
        ("wikitext2", "calibration", "Salesforce/wikitext", ["wikitext-2-raw-v1", "train"]),
        ("wikitext2", "heldout", "Salesforce/wikitext", ["wikitext-2-raw-v1", "test"]),
        ("wikitext2", "validation", "Salesforce/wikitext", ["validation"]),
        ("c4", "calibration", "allenai/c4", ["en/c4-train.00000-of-01024.json.gz", True]),
        ("c4", "heldout", "allenai/c4", ["en/c4-validation.00000-of-00008.json.gz", True]),
        (
            "ptb",
            "calibration",
            "parquet",
            [
                "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/train/0000.parquet"
            ],
        ),
        (
            "ptb",
            "heldout",
            "parquet",
            [
                "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/test/0000.parquet"
            ],
        ),
    ],
)
def test_what_the_hub_is_asked_for(hub, name, split, path, contains):
    texts = load_text(name, split)
    assert len(texts) == 300 and texts[0].startswith(alphabet)
    [(asked, kwargs)] = hub
    assert (
        asked == path
        and "trust_remote_code" not in kwargs
        and not any("{" in str(v) for v in kwargs.values())
    )
    for value in contains:
        assert value in kwargs.values()


def test_only_the_documents_that_are_wanted_are_streamed(monkeypatch):
    monkeypatch.setitem(CORPORA, "c4", Corpus("x", dict(streaming=True), {}, documents=5))
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *a, **k: datasets.IterableDataset.from_generator(
            lambda: ({"text": str(i)} for i in range(100))
        ),
    )
    assert load_text("c4") == list("01234")


def test_the_real_datasets_library_on_local_files(tmp_path, monkeypatch):
    "What the Hub would give, from disk: Parquet, and compressed JSON lines as a stream."
    rows = [{"sentence": f"Sentence {i}."} for i in range(5)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "train.parquet"))
    with gzip.open(tmp_path / "c4-train.json.gz", "wt") as f:
        for i in range(5):
            f.write(json.dumps({"text": f"Page {i}.", "url": "x"}) + "\n")
    local = dict(cache_dir=str(tmp_path / "cache"))
    ptb = dataclasses.replace(
        CORPORA["ptb"],
        kwargs=dict(data_files=str(tmp_path / "{split}.parquet"), split="train", **local),
    )
    c4 = dataclasses.replace(
        CORPORA["c4"],
        path="json",
        splits=dict(calibration="train"),
        documents=3,
        kwargs=dict(
            data_files=str(tmp_path / "c4-{split}.json.gz"), split="train", streaming=True, **local
        ),
    )
    monkeypatch.setattr(texts, "CORPORA", dict(ptb=ptb, c4=c4))
    assert load_text("ptb") == [r["sentence"] for r in rows]
    assert load_text("c4") == ["Page 0.", "Page 1.", "Page 2."]
    with pytest.raises(ValueError, match="cannot read 'c4'"):
        load_text("c4", split="validation")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach the Hub"),
        FileNotFoundError("no such dataset"),
        RuntimeError("scripts are no longer supported"),
    ],
)
def test_no_hub(monkeypatch, error):
    def fail(*a, **k):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    for name in CORPORA:
        with pytest.raises(
            ValueError,
            match=f"cannot read '{name}'.*Hugging Face Hub.*{type(error).__name__}.*"
            "local text file.*passages",
        ) as e:
            load_text(name)
        assert e.value.__cause__ is error


def test_a_stream_that_breaks_on_the_way(monkeypatch):
    def rows():
        yield {"text": "one"}
        raise ConnectionError("lost")

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: datasets.IterableDataset.from_generator(rows)
    )
    with pytest.raises(ValueError, match="cannot read 'c4'.*lost"):
        load_text("c4")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_of_json_ends_with_a_line_feed_only(tmp_path, end):
    "U+2028, U+2029, U+0085 and others end a line for str.splitlines, and may stand inside of JSON."
    documents = ["one\u2028two", "three\u2029four\u0085five", "six"]
    lines = [json.dumps({"text": d}, ensure_ascii=False) for d in documents]
    path = tmp_path / "a.jsonl"
    path.write_bytes(end.join([*lines, ""]).encode())
    assert load_text(path) == documents


def test_passages_need_no_heavy_library():
    code = """
import sys
from linearpatch.workshop.texts import load_text
print(len(load_text("passages")))
print({"torch", "transformers", "datasets"} & set(sys.modules) or "light")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1:] == ["light"]
