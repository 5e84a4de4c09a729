"The command line: what it writes, what it refuses, and that it leaves nothing half-done."
import json, os, re, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch, transformers as tf
from linearpatch.cli import main
from linearpatch.fusion import FAMILIES
from linearpatch.pipeline import _SOURCES, Job, command_line, make_texts, run_job
from linearpatch.models import PLAYGROUND_REMOVE, PLAYGROUND_SEQ_LEN, load_playground, n_layers, playground_path
from linearpatch.report import Report, rows
from repo import root
from tiny import make

T = PLAYGROUND_SEQ_LEN
small = ["--calibration", "passages", "--eval", "passages", "--seq-len", str(T), "--samples", "8", "--batch-size", "16"]


def cli(capsys, *words):
    "Exit code, stdout and stderr of a command."
    with pytest.raises(SystemExit) as e: main([str(w) for w in words])
    out, err = capsys.readouterr()
    return e.value.code, out, err


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def playground(): return load_playground()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    "The demo as a user runs it: a process of its own."
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run([sys.executable, "-c", "from linearpatch.cli import main; main()", "demo", "--out", "demo"], cwd=folder, capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=str(root), HF_HUB_OFFLINE="1"))
    assert done.returncode == 0, done.stderr
    return folder / "demo", done


# The demo

def test_demo_writes_everything(demo):
    folder, done = demo
    assert {p.name for p in folder.iterdir()} == {"report.json", "report.html", "figures", "model"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (folder / "model").iterdir()}
    assert not [p for p in folder.parent.iterdir() if p != folder]
    for figure in re.findall(r"\S+\.png", done.stdout): assert (folder.parent / figure).stat().st_size > 1000


def test_demo_record(demo):
    r = Report.load(demo[0])
    assert r["model"]["name"] == "playground" and sum(b - a for a, b in r["cuts"]) == PLAYGROUND_REMOVE
    p, families = r["perplexity"]["passages"], r["families"]["passages"]
    assert p["dense"] < p["pruned"] == families["none"] and p["patched"] == families["hadamard"]
    assert set(families) == {*FAMILIES, "distilled"} == set(r["kl"]["passages"])
    assert p["distilled"] == families["distilled"] < .95 * p["patched"] and r["distillation"]["mode"] == "online"
    assert set(r["figures"]) == {"magnitude", "massive", "ratios", "scores", "perplexity"}
    assert len(r["figures"]["magnitude"]["raw"]["by_channel"]) == r["model"]["layers"] + 1
    assert all(c[k] for c in r["continuations"] for k in ("prompt", "dense", "pruned", "patched", "distilled"))
    assert str(playground_path()) not in json.dumps(r)


def test_demo_prints_its_table(demo):
    folder, done = demo
    assert repr(Report.load(folder)) in done.stdout and "demo/report.html" in done.stdout and "Next:" in done.stdout


def test_demo_is_quiet(demo): assert not re.search(r"warn|Traceback|deprecat", demo[1].stderr, re.IGNORECASE), demo[1].stderr


def test_demo_student_is_what_was_measured(demo, playground):
    from linearpatch.evaluation import perplexity
    from linearpatch.checkpoint import load_student
    r = Report.load(demo[0])
    _, corpora = make_texts(Job("playground", calibration="passages", eval=("passages",), seq_len=T, samples=1), playground[1])
    assert perplexity(load_student(demo[0] / "model"), corpora["passages"]) == pytest.approx(r["perplexity"]["passages"]["distilled"], rel=1e-4)


def test_demo_student_has_a_card(demo):
    card, r = (demo[0] / "model" / "README.md").read_text(), Report.load(demo[0])
    assert "| passages | " + " | ".join(f"{r['perplexity']['passages'][k]:.2f}" for k in ("dense", "pruned", "patched", "distilled")) + " |" in card
    assert f"{r['calibration']['samples']} windows of {r['calibration']['seq_len']} tokens" in card and "| Distillation | " in card
    a, b = r["cuts"][0]
    assert f"layers {a} to {b - 1} (counted from 0) of {r['model']['layers']}" in card and r["command"] in card


def test_readme_prints_the_demo(demo):
    "The table in README.md holds the numbers that the demo finds."
    text = (root / "README.md").read_text(encoding="utf-8")
    lines = [l.strip() for l in text.splitlines() if re.match(r"\s*(dense|pruned|\+ \w+)\b.*\d", l)]
    lines = {re.match(r"\+? ?\w+", l)[0]: l for l in lines}
    for row in rows(Report.load(demo[0])):
        shown = float(re.findall(r"[\d,]+\.\d+", lines[row["name"]])[0].replace(",", ""))
        assert shown == pytest.approx(row["cells"]["passages"][0], rel=5e-3), row["name"]


# run and diagnose

def test_run_a_folder(capsys, playground):
    model, tokenizer = playground
    model.save_pretrained("mine"), tokenizer.save_pretrained("mine")
    code, out, err = cli(capsys, "run", "mine", "--remove", 2, *small, "--patch", "lstsq", "--out", "out/deep")
    assert code == 0, err
    r = Report.load("out/deep")
    assert r["patch"] == "lstsq" and r["model"]["layers_after"] == n_layers(model) - 2 and r["calibration"]["samples"] == 8
    assert r["command"].startswith("linearpatch run mine --remove 2 --patch lstsq --calibration passages")


def test_given_cuts(capsys):
    code, out, err = cli(capsys, "run", "playground", "--cut", "1:2", "--cut", "4:6", *small, "--out", "out")
    assert code == 0, err
    r = Report.load("out")
    assert r["cuts"] == [[1, 2], [4, 6]] and r["metric"] == "given" and len(r["patches"]) == 2 and "[1, 2), [4, 6)" in out


def test_diagnose(capsys):
    code, out, err = cli(capsys, "diagnose", "playground", "--remove", 2, "--calibration", "passages", "--seq-len", T, "--samples", 8, "--out", "look")
    assert code == 0, err
    assert not os.path.exists("look/model") and Report.load("look")["perplexity"] == {} and "mean |X| by layer" in out


@pytest.mark.parametrize("metric", ["angular", "influence", "cosine-channel", "random"])
def test_metrics(playground, metric):
    r = run_job(*playground, remove=2, metric=metric, calibration="passages", eval=("passages",), seq_len=T, samples=4, batch_size=16)
    assert r["metric"] == metric and sum(b - a for a, b in r["cuts"]) == 2


@pytest.mark.parametrize("family", ["none", "scalar", "procrustes"])
def test_families(playground, family):
    r = run_job(*playground, remove=2, patch=family, calibration="passages", eval=("passages",), seq_len=T, samples=8, batch_size=16)
    assert set(r["families"]["passages"]) == {"none", family}


def test_calibration_by_the_model_itself(playground):
    r = run_job(*playground, remove=2, calibration="self", eval=("passages",), seq_len=T, samples=4, batch_size=16)
    assert r["calibration"]["source"] == "self" and r["calibration"]["samples"] == 4


def test_a_file_of_text(playground, tmp_path):
    (tmp_path / "mine.txt").write_text((playground_path().parent / "passages/heldout").glob("*.txt").__next__().read_text())
    r = run_job(*playground, remove=2, calibration="mine.txt", eval=("mine.txt",), seq_len=32, samples=8, batch_size=16)
    assert list(r["perplexity"]) == ["mine.txt"] and "same file" in r["notes"][0]


def test_one_seed(playground):
    runs = [run_job(*playground, remove=2, metric="random", calibration="passages", eval=("passages",), seq_len=T, samples=4, batch_size=16, seed=s, prompts=("We",)) for s in (0, 0, 1)]
    assert dict(runs[0]) == dict(runs[1]) and runs[0]["continuations"] != runs[2]["continuations"]


def test_batch_size_changes_nothing(playground):
    a, b = (run_job(*playground, remove=2, calibration="passages", eval=("passages",), seq_len=T, samples=6, batch_size=n) for n in (1, 4))
    assert a["cuts"] == b["cuts"] and a["perplexity"]["passages"]["patched"] == pytest.approx(b["perplexity"]["passages"]["patched"], rel=1e-4)


def test_the_teacher_is_left_alone(playground):
    model, _ = playground
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run_job(*playground, remove=2, calibration="passages", eval=("passages",), seq_len=T, samples=4, batch_size=16)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and before.keys() == model.state_dict().keys()


def test_the_recorded_command_repeats_the_run(capsys):
    code, _, err = cli(capsys, "run", "playground", "--remove", 2, *small, "--no-bos", "--out", "a")
    assert code == 0, err
    import shlex
    first = Report.load("a")
    words = shlex.split(first["command"])
    words[words.index("--out") + 1] = "b"
    assert cli(capsys, *words[1:])[0] == 0
    second = Report.load("b")
    assert {k: v for k, v in first.items() if k != "command"} == {k: v for k, v in second.items() if k != "command"}


def test_command_line_is_quoted():
    assert command_line(Job("m", remove=1, eval=("it's.txt",))) == """linearpatch run m --remove 1 --eval 'it'"'"'s.txt'"""


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


@pytest.mark.parametrize("words, said", refusals, ids=[" ".join(map(str, w)) or "nothing" for w, _ in refusals])
def test_bad_input(capsys, tmp_path, words, said):
    (tmp_path / "full").mkdir(), (tmp_path / "full/file").write_text("x"), (tmp_path / "empty.txt").write_text(""), (tmp_path / "short.txt").write_text("Too short.")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = cli(capsys, "run", "playground", *small, *([] if "--out" in words else ["--out", "new"]), *words)
    assert code == 2 and out == ""
    assert len(err.strip().splitlines()) == 1 and err.startswith("error: "), err
    for part in said: assert part in err
    assert sorted(tmp_path.rglob("*")) == before


def test_models_that_are_none(capsys, tmp_path):
    (tmp_path / "nomodel").mkdir(), (tmp_path / "file").write_text("x"), (tmp_path / "bad").mkdir(), (tmp_path / "bad/config.json").write_text("{")
    tf.BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32).save_pretrained("bert")
    tf.T5Config(d_model=32, num_layers=3, num_heads=2).save_pretrained("t5")
    before = sorted(tmp_path.rglob("*"))
    for name, said in (("./nomodel", "no config.json"), ("./file", "is a file"), ("./nowhere", "no folder"), ("bert", "decoder"), ("t5", "encoder-decoder"), ("./bad", "")):
        code, out, err = cli(capsys, "run", name, "--remove", 1, *small, "--out", "new")
        assert code == 2 and err.startswith("error: ") and len(err.strip().splitlines()) == 1 and said in err, (name, err)
    assert sorted(tmp_path.rglob("*")) == before


def no_bos(folder, tokenizer):
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
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
    with torch.no_grad(): next(iter(broken.model.layers[1].parameters()))[0] = float("nan")
    broken.save_pretrained("nan")
    code, _, err = cli(capsys, "run", "nan", "--remove", 2, *small, "--out", "new")
    assert code == 2 and "NaN or infinity" in err and not os.path.exists("new")
    assert os.listdir(".") == ["nan"]
    model.save_pretrained("cut"), tokenizer.save_pretrained("cut")
    with open("cut/model.safetensors", "r+b") as f: f.truncate(1000)
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
    process = subprocess.Popen([sys.executable, "-c", "from linearpatch.cli import main; main()", *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=dict(os.environ, PYTHONPATH=str(root)), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    for line in process.stderr: # in the middle of the work: the partial folder is there
        if "perplexity" in line: break
    assert list(tmp_path.iterdir()), "nothing was begun"
    process.send_signal(sign)
    out, err = process.communicate(timeout=60)
    assert process.returncode == expected and "Traceback" not in err and not list(tmp_path.iterdir())


def test_an_error_in_the_middle_leaves_nothing(playground, tmp_path, monkeypatch):
    import linearpatch.report
    def fails(*_, **__): raise OSError("disk full")
    monkeypatch.setattr(linearpatch.report, "save_report", fails)
    with pytest.raises(OSError, match="disk full"):
        run_job(*playground, remove=2, calibration="passages", eval=("passages",), seq_len=T, samples=2, batch_size=16, out="new")
    assert not list(tmp_path.iterdir())


# Help

def test_help_names_every_choice():
    from linearpatch.fusion import FAMILIES
    from linearpatch.selection import METRICS
    done = subprocess.run([sys.executable, "-c", "import sys; from linearpatch.cli import main\ntry: main(['run', '--help'])\nfinally: print('torch' in sys.modules)"],
                          env=dict(os.environ, PYTHONPATH=str(root), COLUMNS="120", NO_COLOR="1", TERM="dumb"), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith("False"), "the help should not wait for PyTorch"
    for word in (*METRICS, *FAMILIES, *_SOURCES, "self", "--cut", "--metric", "--patch", "--calibration", "--samples", "--seq-len", "--batch-size", "--eval", "--dtype",
                 "--device-map", "--seed", "--trust-remote-code", "--bos", "--no-bos", "Example"): assert word in done.stdout, word


def test_corpora_are_those_of_the_calibration():
    from linearpatch import calibration
    assert set(_SOURCES) == {"passages", *calibration.CORPORA}


def test_defaults_are_the_papers():
    j = Job("m")
    assert (j.samples, j.seq_len, j.calibration, j.eval, j.metric, j.patch) == (128, 2048, "wikitext2", ("wikitext2",), "cosine", "hadamard")


# Distillation

train = ["--distill-samples", "32", "--distill-batch-size", "4", "--lr", "0.01"]


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_run_with_distillation(capsys, tmp_path, mode):
    code, out, err = cli(capsys, "run", "playground", "--remove", 2, *small, "--distill", mode, *train, "--top-k", 20, "--out", "new")
    assert code == 0 and "+ distilled *" in out, err
    r = Report.load("new")
    p, d = r["perplexity"]["passages"], r["distillation"]
    assert p["dense"] < p["distilled"] < p["patched"] and (d["windows"], d["heldout"], d["mode"]) == (29, 3, mode)
    assert (d["top_k"], d["cache_bytes"] is None) == ((20, False) if mode == "offline" else (None, True))
    assert [f["step"] for f in d["history"]] == sorted({f["step"] for f in d["history"]}) and d["history"][-1]["step"] == d["steps"] == 8
    assert (tmp_path / "new" / "figures" / "distillation.png").stat().st_size > 1000
    assert [f.name for f in tmp_path.iterdir()] == ["new"]
    assert "Patch trained" in (tmp_path / "new" / "report.html").read_text() and f"--distill {mode}" in r["command"]


@pytest.fixture
def saved(tmp_path):
    run_job("playground", out=tmp_path / "saved", remove=2, calibration="passages", eval=("passages",), seq_len=T, samples=8, batch_size=16)
    return tmp_path / "saved"


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_distil_a_saved_student(capsys, saved, mode):
    from linearpatch.checkpoint import load_student
    from linearpatch.pruning import patch_modules
    words = ["distill", saved, "--distill", mode, *[w for w in small if w not in ("--samples", "8")], *train]
    code, out, err = cli(capsys, *words, "--out", "trained")
    assert code == 0 and "Loading" not in err, err
    record = json.loads((saved.parent / "trained" / "distillation.json").read_text())
    p, start = record["perplexity"]["passages"], Report.load(saved)["perplexity"]["passages"]["patched"]
    assert p["patched"] == pytest.approx(start, rel=1e-4) and p["distilled"] < p["patched"] and f"-> {p['distilled']:.2f}" in out
    old, new = load_student(saved / "model"), load_student(saved.parent / "trained" / "model")
    assert not torch.equal(patch_modules(old)[0].weight, patch_modules(new)[0].weight)
    a, b = ({k: v for k, v in m.state_dict().items() if "linear_patch" not in k} for m in (old, new))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert sorted(f.name for f in saved.parent.iterdir()) == ["saved", "trained"]


def test_with_a_finished_cache_the_teacher_is_never_loaded(capsys, saved, monkeypatch):
    import linearpatch.pipeline as module
    words = ["distill", saved, *[w for w in small if w not in ("--samples", "8")], *train, "--cache", "cache"]
    assert cli(capsys, *words, "--out", "one")[0] == 0
    monkeypatch.setattr(module, "_load", lambda *a: pytest.fail("the teacher was loaded"))
    assert cli(capsys, *words, "--out", "two")[0] == 0
    one, two = ((saved.parent / k / "model" / "model.safetensors").read_bytes() for k in ("one", "two"))
    assert one == two
    code, _, err = cli(capsys, *words, "--top-k", 7, "--out", "three")
    assert code == 2 and "another K (100, not 7)" in err


def test_an_interrupted_distillation_goes_on(capsys, tmp_path, monkeypatch):
    import linearpatch.distillation as module
    words = ["run", "playground", "--remove", 2, *small, "--distill", "online", *train, "--epochs", 10]
    assert cli(capsys, *words, "--out", "whole")[0] == 0
    step, calls = module._step, []
    def stop(run):
        calls.append(1)
        if len(calls) == 60: raise KeyboardInterrupt
        return step(run)
    monkeypatch.setattr(module, "_step", stop)
    code, _, err = cli(capsys, *words, "--out", "cut")
    assert code == 130 and "cut.distill" in err and "--resume" in err and not (tmp_path / "cut").exists()
    code, _, err = cli(capsys, *words, "--out", "cut")
    assert code == 2 and "go on with --resume" in err
    assert cli(capsys, *words, "--resume", "--out", "cut")[0] == 0 and len(calls) == 60 + 80 - 50
    whole, cut = ((tmp_path / k / "model" / "model.safetensors").read_bytes() for k in ("whole", "cut"))
    assert whole == cut and not (tmp_path / "cut.distill").exists()


@pytest.mark.parametrize("words, said", [
    (["--distill", "both"], "choose one of offline, online"), (["--distill", "offline", "--top-k", 1], "--top-k is 1"),
    (["--distill", "offline", "--top-k", 100000], "the vocabulary has"), (["--distill", "online", "--lr", -1], "lr is -1"), (["--resume"], "give --distill"),
    (["--distill", "online", "--patch", "none"], "choose another"), (["--distill", "online", "--learn", "all"], "full, diagonal, low-rank"),
    (["--distill", "online", "--distill-samples", 100000], "too short")], ids=str)
def test_bad_distillation(capsys, tmp_path, words, said):
    code, _, err = cli(capsys, "run", "playground", "--remove", 2, *small, *words, "--out", "new")
    assert code == 2 and said in err and not list(tmp_path.iterdir())


def test_distil_needs_a_patched_student(capsys, saved):
    for folder, said in (("nowhere", "there is no folder"), (playground_path(), "no student")):
        code, _, err = cli(capsys, "distill", folder, "--calibration", "passages", "--out", "new")
        assert code == 2 and said in err
    other = make("llama"); other.save_pretrained("other")
    load_playground()[1].save_pretrained("other")
    code, _, err = cli(capsys, "distill", saved, "--distill", "online", "--teacher", "other", *[w for w in small if w not in ("--samples", "8")], *train, "--out", "new")
    assert code == 2 and "made from another model (playground)" in err and not (saved.parent / "new").exists()


@pytest.mark.parametrize("cache, said", [("new/cache", "lies in the output folder"), ("a-file", "is a file")])
def test_a_cache_in_a_bad_place(capsys, saved, cache, said):
    (saved.parent / "a-file").write_text("x")
    code, _, err = cli(capsys, "distill", saved, *[w for w in small if w not in ("--samples", "8")], *train, "--cache", cache, "--out", "new")
    assert code == 2 and said in err and not (saved.parent / "new").exists()


def test_a_wrong_teacher_is_refused_before_anything_is_stored(capsys, saved):
    other = make("llama"); other.save_pretrained("other")
    load_playground()[1].save_pretrained("other")
    code, _, err = cli(capsys, "distill", saved, "--teacher", "other", *[w for w in small if w not in ("--samples", "8")], *train, "--cache", "c", "--out", "new")
    assert code == 2 and "made from another model" in err and not (saved.parent / "c").exists()


def test_nothing_else_in_the_work_folder_is_deleted(capsys, tmp_path):
    (tmp_path / "new.distill").mkdir(); (tmp_path / "new.distill" / "mine.txt").write_text("mine")
    assert cli(capsys, "run", "playground", "--remove", 2, *small, "--distill", "offline", *train, "--out", "new")[0] == 0
    assert [f.name for f in (tmp_path / "new.distill").iterdir()] == ["mine.txt"]


def test_a_text_too_short_for_the_windows_to_distil_on(capsys):
    words = ["run", "playground", "--remove", 2, *small, "--distill", "online", "--distill-samples", 700, "--distill-batch-size", 50, "--lr", 0.01, "--out", "new"]
    code, out, err = cli(capsys, *words)
    assert code == 2 and "too short" in err and "--overlap" in err and not Path("new").exists()
    assert cli(capsys, *words, "--overlap")[0] == 0
    assert "--overlap" in Report.load("new")["command"]
