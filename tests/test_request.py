"What a run has to decide: declared once, checked early, and repeated by a command."

import os
import shlex
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from repo import root

from linearpatch.method.models import load_model, load_playground
from linearpatch.workshop.cuts import Cut
from linearpatch.workshop.options import (
    FAMILY_NAMES,
    HOW,
    MACHINE,
    METRIC_NAMES,
    SOURCES,
    TASK,
    TEXT,
    TRAINING,
    WHAT,
    RunConfig,
    option_name,
    options,
)
from linearpatch.workshop.pipeline import run_pipeline
from linearpatch.workshop.request import command_line, training_settings, untied_parameters
from linearpatch.workshop.saved import fold_saved_student


def test_command_line_is_quoted():
    assert (
        command_line(RunConfig("m", remove=1, eval=("it's.txt",)))
        == """linearpatch run m --remove 1 --eval 'it'"'"'s.txt'"""
    )


def test_corpora_are_those_of_the_calibration():
    from linearpatch import calibration

    assert set(SOURCES) == {"passages", *calibration.CORPORA}


def test_defaults_are_the_papers():
    j = RunConfig("m")
    assert (j.samples, j.seq_len, j.calibration, j.eval, j.metric, j.patch) == (
        128,
        2048,
        "wikitext2",
        ("wikitext2",),
        "cosine",
        "hadamard",
    )


# What is declared here is what the rooms that do the work know


def test_the_words_are_those_of_their_rooms():
    from linearpatch.method.distillation import LEARN
    from linearpatch.method.families import FAMILIES
    from linearpatch.method.scaling import AVERAGINGS
    from linearpatch.method.selection import METRICS

    choices = {f.name: f.metadata["choices"] for f in fields(RunConfig) if f.metadata}
    assert choices["metric"] == METRIC_NAMES == METRICS
    assert choices["families"] == FAMILY_NAMES == FAMILIES
    assert choices["patch"] == (*FAMILY_NAMES, "auto")
    assert choices["averaging"] == AVERAGINGS
    assert choices["learn"] == tuple(LEARN)


def test_training_has_the_same_defaults():
    from linearpatch.method.distillation import Training

    given = training_settings(RunConfig("m"))
    assert Training(**given) == Training()
    assert set(given) <= {f.name for f in fields(Training)}


def test_every_option_has_help_and_a_heading():
    for f in options():
        assert f.metadata["help"][0].isupper() or f.metadata["help"].startswith("offline"), f.name
        assert f.metadata["panel"] in (WHAT, HOW, TEXT, TASK, TRAINING, MACHINE), f.name
        assert f.default is not MISSING, f.name


def test_every_option_of_a_run_is_on_its_command_line():
    from typer.main import get_command

    from linearpatch.workshop.cli import app

    run = get_command(app).commands["run"]
    asked = {p.name: p for p in run.params}
    assert set(asked) == {"model"} | {f.name for f in options()}
    for f in options():
        names = option_name(f).split("/")
        assert asked[f.name].opts + asked[f.name].secondary_opts == names, f.name
        assert asked[f.name].help.startswith(f.metadata["help"]), f.name


ANOTHER = dict(
    remove=3,
    cuts=(Cut(2, 5), "7:8"),
    metric="angular",
    patch="scalar",
    families=FAMILY_NAMES,
    first_token=True,
    fold=True,
    calibration="c4",
    samples=7,
    seq_len=99,
    bos=False,
    eval=("ptb", "my notes.txt"),
    eval_samples=3,
    prompts=("It's",),
    tasks=("offline", "mmlu"),
    task_limit=4,
    task_batch_size=5,
    task_bos=False,
    task_cache="kept",
    distill="online",
    distill_samples=20,
    overlap=True,
    top_k=9,
    distill_batch_size=2,
    lr=0.5,
    epochs=3,
    learn="diagonal",
    accumulate=2,
    weight_decay=0.1,
    patience=2,
    gradient_checkpointing=True,
    batch_size=3,
    dtype="float32",
    device_map="auto",
    seed=11,
    trust_remote_code=True,
    out="there",
)


def test_the_command_line_brings_every_option_back(monkeypatch):
    "Written down by `command_line`, read again by the command: the same request."
    import linearpatch as lp
    import linearpatch.workshop.cli as cli

    assert set(ANOTHER) == {f.name for f in options() if f.metadata["repeat"]}
    line = shlex.split(command_line(RunConfig("org/model", **ANOTHER)))
    asked = {}
    monkeypatch.setattr(lp, "run_pipeline", lambda model, **kw: asked.update(kw, model=model))
    monkeypatch.setattr(lp.telling, "tell", lambda *a, **k: None)
    monkeypatch.setattr(cli, "check_at_once", lambda request: None)
    with pytest.raises(SystemExit) as e:
        cli.main(line[1:])
    assert e.value.code == 0 and asked["model"] == "org/model"
    want = ANOTHER | dict(cuts=("2:5", "7:8"), out=Path("there"), task_cache=Path("kept"))
    assert {k: asked[k] for k in want} == want


def test_defaults_are_not_repeated():
    assert command_line(RunConfig("m", remove=1)) == "linearpatch run m --remove 1"


# At once: before anything heavy is imported


AT_ONCE = """
import sys
from linearpatch.workshop.cli import main
try:
    main(sys.argv[1:])
finally:
    print(sorted({"torch", "transformers", "matplotlib"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "words, code",
    [
        (["--help"], 0),
        (["run", "./nowhere", "--remove", "2", "--out", "x"], 2),
        (["run", "playground", "--cut", "3-5", "--out", "x"], 2),
        (["run", "playground", "--cut", "3:55", "--out", "x"], 2),
        (["run", "playground", "--remove", "99", "--out", "x"], 2),
        (["diagnose", "./nowhere", "--remove", "2", "--out", "x"], 2),
        (["compare", "./nowhere", "--remove", "2", "--out", "x"], 2),
        (["distill", "nowhere", "--out", "x"], 2),
        (["fold", "nowhere", "--out", "x"], 2),
        (["evaluate", "no/such/folder"], 2),
    ],
    ids=str,
)
def test_answered_at_once(words, code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", AT_ONCE, *words],
        cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=str(root)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


# A fold that unties the head


def test_a_fold_that_makes_the_model_larger(capsys, tmp_path):
    config = load_playground()[0].config
    assert config.tie_word_embeddings
    more = config.vocab_size * config.hidden_size
    assert untied_parameters(config, ("hadamard",)) == more
    assert untied_parameters(config, ("scalar", "mlp", "none")) == 0
    config.tie_word_embeddings = False
    assert untied_parameters(config, ("hadamard",)) == 0


@pytest.mark.parametrize("family", ["scalar", "procrustes"])
def test_the_warning_is_right(capsys, tmp_path, family):
    "Before the work it says how many parameters the fold leaves; both commands do."
    small = dict(calibration="passages", eval=("passages",), seq_len=32, samples=8, batch_size=16)
    common = dict(remove=2, patch=family, progress=True, **small)
    run_pipeline("playground", fold=True, out=tmp_path / "folded", **common)
    said = capsys.readouterr().err
    folded = load_model(tmp_path / "folded" / "model")[0].num_parameters()
    assert (f"become {folded:,}" in said) == (family != "scalar") == ("warning" in said)
    if "warning" in said:
        assert said.index("warning") < said.index("statistics of every layer")
    run_pipeline("playground", out=tmp_path / "patched", **common)
    capsys.readouterr()
    fold_saved_student(
        tmp_path / "patched", tmp_path / "plain", "passages", seq_len=32, progress=True
    )
    assert (f"become {folded:,}" in capsys.readouterr().err) == (family != "scalar")
