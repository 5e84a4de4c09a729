"Students that were saved earlier: distilled from the command line, with the right teacher or none."

import json

import pytest
import torch
from tiny import make

from linearpatch.method.models import PLAYGROUND_SEQ_LEN, load_playground
from linearpatch.workshop.cli import main
from linearpatch.workshop.pipeline import run_pipeline
from linearpatch.workshop.places import playground_path
from linearpatch.workshop.report import Report

T = PLAYGROUND_SEQ_LEN
small = [
    "--calibration",
    "passages",
    "--eval",
    "passages",
    "--seq-len",
    str(T),
    "--samples",
    "8",
    "--batch-size",
    "16",
]


def cli(capsys, *words):
    "Exit code, stdout and stderr of a command."
    with pytest.raises(SystemExit) as e:
        main([str(w) for w in words])
    out, err = capsys.readouterr()
    return e.value.code, out, err


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


train = ["--distill-samples", "32", "--distill-batch-size", "4", "--lr", "0.01"]


@pytest.fixture
def saved(tmp_path):
    run_pipeline(
        "playground",
        out=tmp_path / "saved",
        remove=2,
        calibration="passages",
        eval=("passages",),
        seq_len=T,
        samples=8,
        batch_size=16,
    )
    return tmp_path / "saved"


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_distil_a_saved_student(capsys, saved, mode):
    from linearpatch.method.pruning import patch_modules
    from linearpatch.workshop.checkpoint import load_student

    words = [
        "distill",
        saved,
        "--distill",
        mode,
        *[w for w in small if w not in ("--samples", "8")],
        *train,
    ]
    code, out, err = cli(capsys, *words, "--out", "trained")
    assert code == 0 and "Loading" not in err, err
    record = json.loads((saved.parent / "trained" / "distillation.json").read_text())
    p, start = (
        record["perplexity"]["passages"],
        Report.load(saved)["perplexity"]["passages"]["patched"],
    )
    assert (
        p["patched"] == pytest.approx(start, rel=1e-4)
        and p["distilled"] < p["patched"]
        and f"-> {p['distilled']:.2f}" in out
    )
    old, new = load_student(saved / "model"), load_student(saved.parent / "trained" / "model")
    assert not torch.equal(patch_modules(old)[0].weight, patch_modules(new)[0].weight)
    a, b = (
        {k: v for k, v in m.state_dict().items() if "linear_patch" not in k} for m in (old, new)
    )
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert sorted(f.name for f in saved.parent.iterdir()) == ["saved", "trained"]


def test_with_a_finished_cache_the_teacher_is_never_loaded(capsys, saved, monkeypatch):
    import linearpatch.workshop.saved as module

    words = [
        "distill",
        saved,
        *[w for w in small if w not in ("--samples", "8")],
        *train,
        "--cache",
        "cache",
    ]
    assert cli(capsys, *words, "--out", "one")[0] == 0
    monkeypatch.setattr(module, "load_intact", lambda *a: pytest.fail("the teacher was loaded"))
    assert cli(capsys, *words, "--out", "two")[0] == 0
    one, two = (
        (saved.parent / k / "model" / "model.safetensors").read_bytes() for k in ("one", "two")
    )
    assert one == two
    code, _, err = cli(capsys, *words, "--top-k", 7, "--out", "three")
    assert code == 2 and "another K (100, not 7)" in err


def test_a_cache_that_is_kept_beside_the_state_is_not_deleted(capsys, saved):
    own = [w for w in small if w not in ("--samples", "8")]
    words = ["distill", saved, *own, *train, "--cache", "one.distill/cache"]
    assert cli(capsys, *words, "--out", "one")[0] == 0
    place = saved.parent / "one.distill" / "cache"
    assert (place / "manifest.json").is_file() and list(place.glob("shard-*"))


def test_distil_needs_a_patched_student(capsys, saved):
    for folder, said in (("nowhere", "there is no folder"), (playground_path(), "no student")):
        code, _, err = cli(capsys, "distill", folder, "--calibration", "passages", "--out", "new")
        assert code == 2 and said in err
    other = make("llama")
    other.save_pretrained("other")
    load_playground()[1].save_pretrained("other")
    code, _, err = cli(
        capsys,
        "distill",
        saved,
        "--distill",
        "online",
        "--teacher",
        "other",
        *[w for w in small if w not in ("--samples", "8")],
        *train,
        "--out",
        "new",
    )
    assert (
        code == 2
        and "made from another model (playground)" in err
        and not (saved.parent / "new").exists()
    )


@pytest.mark.parametrize(
    "cache, said", [("new/cache", "lies in the output folder"), ("a-file", "is a file")]
)
def test_a_cache_in_a_bad_place(capsys, saved, cache, said):
    (saved.parent / "a-file").write_text("x")
    code, _, err = cli(
        capsys,
        "distill",
        saved,
        *[w for w in small if w not in ("--samples", "8")],
        *train,
        "--cache",
        cache,
        "--out",
        "new",
    )
    assert code == 2 and said in err and not (saved.parent / "new").exists()


def test_a_wrong_teacher_is_refused_before_anything_is_stored(capsys, saved):
    other = make("llama")
    other.save_pretrained("other")
    load_playground()[1].save_pretrained("other")
    code, _, err = cli(
        capsys,
        "distill",
        saved,
        "--teacher",
        "other",
        *[w for w in small if w not in ("--samples", "8")],
        *train,
        "--cache",
        "c",
        "--out",
        "new",
    )
    assert code == 2 and "made from another model" in err and not (saved.parent / "c").exists()
