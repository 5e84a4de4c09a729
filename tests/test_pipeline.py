"The whole run, called from Python: what it chooses, measures and leaves alone."

import pytest
import torch

import linearpatch.workshop.pipeline
from linearpatch.method.models import PLAYGROUND_SEQ_LEN, load_playground
from linearpatch.workshop.pipeline import run_pipeline
from linearpatch.workshop.places import playground_path

T = PLAYGROUND_SEQ_LEN


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def playground():
    return load_playground()


@pytest.mark.parametrize("metric", ["angular", "influence", "cosine-channel", "random"])
def test_metrics(playground, metric):
    r = run_pipeline(
        *playground,
        remove=2,
        metric=metric,
        calibration="passages",
        eval=("passages",),
        seq_len=T,
        samples=4,
        batch_size=16,
    )
    assert r["metric"] == metric and sum(b - a for a, b in r["cuts"]) == 2


@pytest.mark.parametrize("family", ["none", "scalar", "procrustes"])
def test_families(playground, family):
    r = run_pipeline(
        *playground,
        remove=2,
        patch=family,
        calibration="passages",
        eval=("passages",),
        seq_len=T,
        samples=8,
        batch_size=16,
    )
    assert set(r["families"]["passages"]) == {"none", family}


def test_calibration_by_the_model_itself(playground):
    r = run_pipeline(
        *playground,
        remove=2,
        calibration="self",
        eval=("passages",),
        seq_len=T,
        samples=4,
        batch_size=16,
    )
    assert r["calibration"]["source"] == "self" and r["calibration"]["samples"] == 4


def test_a_file_of_text(playground, tmp_path):
    (tmp_path / "mine.txt").write_text(
        (playground_path().parent / "passages/heldout").glob("*.txt").__next__().read_text()
    )
    r = run_pipeline(
        *playground,
        remove=2,
        calibration="mine.txt",
        eval=("mine.txt",),
        seq_len=32,
        samples=8,
        batch_size=16,
    )
    assert list(r["perplexity"]) == ["mine.txt"] and any("same file" in note for note in r["notes"])


def test_one_seed(playground):
    runs = [
        run_pipeline(
            *playground,
            remove=2,
            metric="random",
            calibration="passages",
            eval=("passages",),
            seq_len=T,
            samples=4,
            batch_size=16,
            seed=s,
            prompts=("We",),
        )
        for s in (0, 0, 1)
    ]
    assert dict(runs[0]) == dict(runs[1]) and runs[0]["continuations"] != runs[2]["continuations"]


def test_batch_size_changes_nothing(playground):
    a, b = (
        run_pipeline(
            *playground,
            remove=2,
            calibration="passages",
            eval=("passages",),
            seq_len=T,
            samples=6,
            batch_size=n,
        )
        for n in (1, 4)
    )
    assert a["cuts"] == b["cuts"] and a["perplexity"]["passages"]["patched"] == pytest.approx(
        b["perplexity"]["passages"]["patched"], rel=1e-4
    )


def test_the_teacher_is_left_alone(playground):
    model, _ = playground
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run_pipeline(
        *playground,
        remove=2,
        calibration="passages",
        eval=("passages",),
        seq_len=T,
        samples=4,
        batch_size=16,
    )
    assert (
        all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        and before.keys() == model.state_dict().keys()
    )


def test_an_error_in_the_middle_leaves_nothing(playground, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(linearpatch.workshop.pipeline, "save_report", fails)
    with pytest.raises(OSError, match="disk full"):
        run_pipeline(
            *playground,
            remove=2,
            calibration="passages",
            eval=("passages",),
            seq_len=T,
            samples=2,
            batch_size=16,
            out="new",
        )
    assert not list(tmp_path.iterdir())
