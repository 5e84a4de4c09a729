"The command line: what it writes, what it refuses, and that it leaves nothing half-done."

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from repo import root

from linearpatch.method.families import FAMILIES
from linearpatch.method.models import (
    PLAYGROUND_REMOVE,
    PLAYGROUND_SEQ_LEN,
    load_playground,
    n_layers,
)
from linearpatch.workshop.cli import main
from linearpatch.workshop.inputs import make_texts
from linearpatch.workshop.options import SOURCES, RunConfig
from linearpatch.workshop.places import playground_path
from linearpatch.workshop.report import Report, rows

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


@pytest.fixture(scope="module")
def playground():
    return load_playground()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    "The demo as a user runs it: a process of its own."
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from linearpatch.workshop.cli import main; main()",
            "demo",
            "--out",
            "demo",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(root), HF_HUB_OFFLINE="1"),
    )
    assert done.returncode == 0, done.stderr
    return folder / "demo", done


# The demo


def test_demo_writes_everything(demo):
    folder, done = demo
    assert {p.name for p in folder.iterdir()} == {"report.json", "report.html", "figures", "model"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in (folder / "model").iterdir()
    }
    assert not [p for p in folder.parent.iterdir() if p != folder]
    for figure in re.findall(r"\S+\.png", done.stdout):
        assert (folder.parent / figure).stat().st_size > 1000


def test_demo_record(demo):
    r = Report.load(demo[0])
    assert (
        r["model"]["name"] == "playground" and sum(b - a for a, b in r["cuts"]) == PLAYGROUND_REMOVE
    )
    p, families = r["perplexity"]["passages"], r["families"]["passages"]
    assert p["dense"] < p["pruned"] == families["none"] and p["patched"] == families["hadamard"]
    assert set(families) == {*FAMILIES, "distilled"} == set(r["kl"]["passages"])
    assert (
        p["distilled"] == families["distilled"] < 0.95 * p["patched"]
        and r["distillation"]["mode"] == "online"
    )
    assert set(r["figures"]) == {"magnitude", "massive", "ratios", "scores", "perplexity"}
    assert len(r["figures"]["magnitude"]["raw"]["by_channel"]) == r["model"]["layers"] + 1
    assert all(
        c[k]
        for c in r["continuations"]
        for k in ("prompt", "dense", "pruned", "patched", "distilled")
    )
    assert str(playground_path()) not in json.dumps(r)


def test_demo_prints_its_table(demo):
    folder, done = demo
    assert (
        repr(Report.load(folder)) in done.stdout
        and "demo/report.html" in done.stdout
        and "Next:" in done.stdout
    )


def test_demo_is_quiet(demo):
    assert not re.search(r"warn|Traceback|deprecat", demo[1].stderr, re.IGNORECASE), demo[1].stderr


def test_demo_student_is_what_was_measured(demo, playground):
    from linearpatch.workshop.checkpoint import load_student
    from linearpatch.workshop.evaluation import perplexity

    r = Report.load(demo[0])
    _, corpora = make_texts(
        RunConfig("playground", calibration="passages", eval=("passages",), seq_len=T, samples=1),
        playground[1],
    )
    assert perplexity(load_student(demo[0] / "model"), corpora["passages"]) == pytest.approx(
        r["perplexity"]["passages"]["distilled"], rel=1e-4
    )


def test_demo_student_has_a_card(demo):
    card, r = (demo[0] / "model" / "README.md").read_text(), Report.load(demo[0])
    assert (
        "| passages | "
        + " | ".join(
            f"{r['perplexity']['passages'][k]:.2f}"
            for k in ("dense", "pruned", "patched", "distilled")
        )
        + " |"
        in card
    )
    assert (
        f"{r['calibration']['samples']} windows of {r['calibration']['seq_len']} tokens" in card
        and "| Distillation | " in card
    )
    a, b = r["cuts"][0]
    assert (
        f"layers {a} to {b - 1} (counted from 0) of {r['model']['layers']}" in card
        and r["command"] in card
    )


def test_readme_prints_the_demo(demo):
    "The table in README.md holds the numbers that the demo finds."
    text = (root / "README.md").read_text(encoding="utf-8")
    lines = [
        l.strip() for l in text.splitlines() if re.match(r"\s*(dense|pruned|\+ [\w-]+)\b.*\d", l)
    ]
    lines = {re.match(r"\+? ?[\w-]+", l)[0]: l for l in lines}
    for row in rows(Report.load(demo[0])):
        shown = float(re.findall(r"[\d,]+\.\d+", lines[row["name"]])[0].replace(",", ""))
        assert shown == pytest.approx(row["cells"]["passages"][0], rel=5e-3), row["name"]


# run and diagnose


def test_run_a_folder(capsys, playground):
    model, tokenizer = playground
    model.save_pretrained("mine"), tokenizer.save_pretrained("mine")
    code, out, err = cli(
        capsys, "run", "mine", "--remove", 2, *small, "--patch", "lstsq", "--out", "out/deep"
    )
    assert code == 0, err
    r = Report.load("out/deep")
    assert (
        r["patch"] == "lstsq"
        and r["model"]["layers_after"] == n_layers(model) - 2
        and r["calibration"]["samples"] == 8
    )
    assert r["command"].startswith(
        "linearpatch run mine --remove 2 --patch lstsq --calibration passages"
    )


def test_given_cuts(capsys):
    code, out, err = cli(
        capsys, "run", "playground", "--cut", "1:2", "--cut", "4:6", *small, "--out", "out"
    )
    assert code == 0, err
    r = Report.load("out")
    assert (
        r["cuts"] == [[1, 2], [4, 6]]
        and r["metric"] == "given"
        and len(r["patches"]) == 2
        and "[1, 2), [4, 6)" in out
    )


def test_diagnose(capsys):
    code, out, err = cli(
        capsys,
        "diagnose",
        "playground",
        "--remove",
        2,
        "--calibration",
        "passages",
        "--seq-len",
        T,
        "--samples",
        8,
        "--out",
        "look",
    )
    assert code == 0, err
    assert (
        not os.path.exists("look/model")
        and Report.load("look")["perplexity"] == {}
        and "mean |X| by layer" in out
    )


def test_the_recorded_command_repeats_the_run(capsys):
    code, _, err = cli(capsys, "run", "playground", "--remove", 2, *small, "--no-bos", "--out", "a")
    assert code == 0, err
    import shlex

    first = Report.load("a")
    words = shlex.split(first["command"])
    words[words.index("--out") + 1] = "b"
    assert cli(capsys, *words[1:])[0] == 0
    second = Report.load("b")
    assert {k: v for k, v in first.items() if k != "command"} == {
        k: v for k, v in second.items() if k != "command"
    }


# Bad input: one line, exit code 2, nothing on the disk

L = json.loads((playground_path() / "config.json").read_text())["num_hidden_layers"]
refusals = [
    (["--remove", L], [f"{L} of {L} layers", f"at most {L - 1}"]),
    (["--remove", L + 3], [f"{L + 3} of {L} layers"]),
    (["--remove", 0], ["--remove is 0", "at least 1"]),
    (["--remove", -1], ["--remove is -1"]),
    (["--remove", "two"], ["--remove"]),
    ([], ["--remove N", "--cut A:B"]),
    (["--cut", f"{L - 1}:{L + 1}"], ["out of range", f"{L} layers"]),
    (["--cut", "1:3", "--cut", "2:4"], ["overlap at layer 2"]),
    (["--cut", "3-5"], ["'3-5'", "2:5"]),
    (["--cut", "3:3"], ["3", "start < stop"]),
    (["--cut", f"0:{L}"], ["all"]),
    (["--cut", "1:3", "--remove", 3], ["disagree"]),
    (["--remove", 2, "--metric", "cosin"], ["unknown metric 'cosin'", "cosine"]),
    (["--remove", 2, "--patch", "hadamar"], ["unknown patch 'hadamar'", "hadamard"]),
    (["--remove", 2, "--dtype", "int3"], ["unknown dtype 'int3'", "bfloat16"]),
    (["--remove", 2, "--samples", 0], ["--samples is 0"]),
    (["--remove", 2, "--samples", 100000], ["too short", "tokens"]),
    (["--remove", 2, "--seq-len", 1], ["--seq-len is 1"]),
    (["--remove", 2, "--seq-len", 10**6], ["1000000", "positions"]),
    (["--remove", 2, "--batch-size", 0], ["--batch-size is 0"]),
    (["--remove", 2, "--calibration", "wikitext3"], ["'wikitext3'", "wikitext2"]),
    (["--remove", 2, "--calibration", "empty.txt"], ["empty.txt", "0 tokens"]),
    (["--remove", 2, "--calibration", "short.txt"], ["too short", "tokens", str(8 * (T - 1))]),
    (["--remove", 2, "--calibration", "."], ["is a folder"]),
    (["--remove", 2, "--eval", "nothing.txt"], ["'nothing.txt'"]),
    (["--remove", 2, "--eval", "short.txt"], ["too short", "tokens"]),
    (["--remove", 2, "--out", "full"], ["full", "not empty"]),
    (["--remove", 2, "--out", "empty.txt"], ["is a file"]),
    (["--remove", 2, "--wrong"], ["--wrong"]),
]


@pytest.mark.parametrize(
    "words, said", refusals, ids=[" ".join(map(str, w)) or "nothing" for w, _ in refusals]
)
def test_bad_input(capsys, tmp_path, words, said):
    (
        (tmp_path / "full").mkdir(),
        (tmp_path / "full/file").write_text("x"),
        (tmp_path / "empty.txt").write_text(""),
        (tmp_path / "short.txt").write_text("Too short."),
    )
    before = sorted(tmp_path.rglob("*"))
    code, out, err = cli(
        capsys, "run", "playground", *small, *([] if "--out" in words else ["--out", "new"]), *words
    )
    assert code == 2 and out == ""
    assert len(err.strip().splitlines()) == 1 and err.startswith("error: "), err
    for part in said:
        assert part in err
    assert sorted(tmp_path.rglob("*")) == before


def test_models_that_are_none(capsys, tmp_path):
    (
        (tmp_path / "nomodel").mkdir(),
        (tmp_path / "file").write_text("x"),
        (tmp_path / "bad").mkdir(),
        (tmp_path / "bad/config.json").write_text("{"),
    )
    tf.BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    ).save_pretrained("bert")
    tf.T5Config(d_model=32, num_layers=3, num_heads=2).save_pretrained("t5")
    before = sorted(tmp_path.rglob("*"))
    for name, said in (
        ("./nomodel", "no config.json"),
        ("./file", "is a file"),
        ("./nowhere", "no folder"),
        ("bert", "decoder"),
        ("t5", "encoder-decoder"),
        ("./bad", ""),
    ):
        code, out, err = cli(capsys, "run", name, "--remove", 1, *small, "--out", "new")
        assert (
            code == 2
            and err.startswith("error: ")
            and len(err.strip().splitlines()) == 1
            and said in err
        ), (name, err)
    assert sorted(tmp_path.rglob("*")) == before


def no_bos(folder, tokenizer):
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)


def test_a_tokenizer_without_bos(capsys, playground):
    model, tokenizer = playground
    model.save_pretrained("mine"), no_bos("mine", tokenizer)
    code, _, err = cli(capsys, "run", "mine", "--remove", 2, *small, "--out", "new")
    assert code == 2 and "--no-bos" in err and not os.path.exists("new")
    code, _, err = cli(capsys, "run", "mine", "--remove", 2, *small, "--no-bos", "--out", "new")
    assert code == 0, err


def test_damaged_weights(capsys, playground):
    model, tokenizer = playground
    tokenizer.save_pretrained("nan")
    broken = tf.AutoModelForCausalLM.from_config(model.config)
    with torch.no_grad():
        next(iter(broken.model.layers[1].parameters()))[0] = float("nan")
    broken.save_pretrained("nan")
    code, _, err = cli(capsys, "run", "nan", "--remove", 2, *small, "--out", "new")
    assert code == 2 and "NaN or infinity" in err and not os.path.exists("new")
    assert os.listdir(".") == ["nan"]
    model.save_pretrained("cut"), tokenizer.save_pretrained("cut")
    with open("cut/model.safetensors", "r+b") as f:
        f.truncate(1000)
    code, _, err = cli(capsys, "run", "cut", "--remove", 2, *small, "--out", "new")
    assert code == 2 and "weights" in err and not os.path.exists("new")


def test_refusals_need_no_weights(capsys, playground):
    playground[0].config.save_pretrained("mine")
    code, _, err = cli(capsys, "run", "mine", "--remove", L, *small, "--out", "new")
    assert code == 2 and "layers" in err


# Interruption


@pytest.mark.parametrize("sign, expected", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing(tmp_path, sign, expected):
    words = ["demo", "--out", "demo"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from linearpatch.workshop.cli import main; main()", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(root)),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    for line in process.stderr:  # in the middle of the work: the partial folder is there
        if "perplexity" in line:
            break
    assert list(tmp_path.iterdir()), "nothing was begun"
    process.send_signal(sign)
    out, err = process.communicate(timeout=60)
    assert (
        process.returncode == expected and "Traceback" not in err and not list(tmp_path.iterdir())
    )


# Help


def test_help_names_every_choice():
    from linearpatch.method.families import FAMILIES
    from linearpatch.method.selection import METRICS

    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from linearpatch.workshop.cli import main\ntry: main(['run', '--help'])\nfinally: print('torch' in sys.modules)",
        ],
        env=dict(os.environ, PYTHONPATH=str(root), COLUMNS="120", NO_COLOR="1", TERM="dumb"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.strip().endswith("False"), (
        "the help should not wait for PyTorch"
    )
    for word in (
        *METRICS,
        *FAMILIES,
        *SOURCES,
        "self",
        "--cut",
        "--metric",
        "--patch",
        "--calibration",
        "--samples",
        "--seq-len",
        "--batch-size",
        "--eval",
        "--dtype",
        "--device-map",
        "--seed",
        "--trust-remote-code",
        "--bos",
        "--no-bos",
        "Example",
    ):
        assert word in done.stdout, word


# Distillation

train = ["--distill-samples", "32", "--distill-batch-size", "4", "--lr", "0.01"]


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_run_with_distillation(capsys, tmp_path, mode):
    code, out, err = cli(
        capsys,
        "run",
        "playground",
        "--remove",
        2,
        *small,
        "--distill",
        mode,
        *train,
        "--top-k",
        20,
        "--out",
        "new",
    )
    assert code == 0 and "+ distilled *" in out, err
    r = Report.load("new")
    p, d = r["perplexity"]["passages"], r["distillation"]
    assert p["dense"] < p["distilled"] < p["patched"] and (
        d["windows"],
        d["heldout"],
        d["mode"],
    ) == (29, 3, mode)
    assert (d["top_k"], d["cache_bytes"] is None) == (
        (20, False) if mode == "offline" else (None, True)
    )
    assert [f["step"] for f in d["history"]] == sorted({f["step"] for f in d["history"]}) and d[
        "history"
    ][-1]["step"] == d["steps"] == 8
    assert (tmp_path / "new" / "figures" / "distillation.png").stat().st_size > 1000
    assert [f.name for f in tmp_path.iterdir()] == ["new"]
    assert (
        "Patch trained" in (tmp_path / "new" / "report.html").read_text()
        and f"--distill {mode}" in r["command"]
    )


def test_an_interrupted_distillation_goes_on(capsys, tmp_path, monkeypatch):
    import linearpatch.method.distillation as module

    words = [
        "run",
        "playground",
        "--remove",
        2,
        *small,
        "--distill",
        "online",
        *train,
        "--epochs",
        10,
    ]
    assert cli(capsys, *words, "--out", "whole")[0] == 0
    step, calls = module.train_step, []

    def stop(run):
        calls.append(1)
        if len(calls) == 60:
            raise KeyboardInterrupt
        return step(run)

    monkeypatch.setattr(module, "train_step", stop)
    code, _, err = cli(capsys, *words, "--out", "cut")
    assert (
        code == 130
        and "cut.distill" in err
        and "--resume" in err
        and not (tmp_path / "cut").exists()
    )
    code, _, err = cli(capsys, *words, "--out", "cut")
    assert code == 2 and "go on with --resume" in err
    assert cli(capsys, *words, "--resume", "--out", "cut")[0] == 0 and len(calls) == 60 + 80 - 50
    whole, cut = (
        (tmp_path / k / "model" / "model.safetensors").read_bytes() for k in ("whole", "cut")
    )
    assert whole == cut and not (tmp_path / "cut.distill").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--distill", "both"], "choose one of offline, online"),
        (["--distill", "offline", "--top-k", 1], "--top-k is 1"),
        (["--distill", "offline", "--top-k", 100000], "the vocabulary has"),
        (["--distill", "online", "--lr", -1], "lr is -1"),
        (["--resume"], "give --distill"),
        (["--distill", "online", "--patch", "none"], "choose another"),
        (["--distill", "online", "--learn", "all"], "full, diagonal, low-rank"),
        (["--distill", "online", "--distill-samples", 100000], "too short"),
    ],
    ids=str,
)
def test_bad_distillation(capsys, tmp_path, words, said):
    code, _, err = cli(capsys, "run", "playground", "--remove", 2, *small, *words, "--out", "new")
    assert code == 2 and said in err and not list(tmp_path.iterdir())


def test_nothing_else_in_the_work_folder_is_deleted(capsys, tmp_path):
    (tmp_path / "new.distill").mkdir()
    (tmp_path / "new.distill" / "mine.txt").write_text("mine")
    assert (
        cli(
            capsys,
            "run",
            "playground",
            "--remove",
            2,
            *small,
            "--distill",
            "offline",
            *train,
            "--out",
            "new",
        )[0]
        == 0
    )
    assert [f.name for f in (tmp_path / "new.distill").iterdir()] == ["mine.txt"]


def test_a_text_too_short_for_the_windows_to_distil_on(capsys):
    words = [
        "run",
        "playground",
        "--remove",
        2,
        *small,
        "--distill",
        "online",
        "--distill-samples",
        700,
        "--distill-batch-size",
        50,
        "--lr",
        0.01,
        "--out",
        "new",
    ]
    code, out, err = cli(capsys, *words)
    assert code == 2 and "too short" in err and "--overlap" in err and not Path("new").exists()
    assert cli(capsys, *words, "--overlap")[0] == 0
    assert "--overlap" in Report.load("new")["command"]
