"The harness: the items, lm-eval's numbers against our own, kept results, bad input, the commands."

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from repo import root
from tiny import random_patch
from transformers import LlamaConfig

import linearpatch.workshop.harness as harness
from linearpatch.method.models import load_playground
from linearpatch.method.pruning import prune
from linearpatch.workshop.checkpoint import save_student
from linearpatch.workshop.cuts import Cut
from linearpatch.workshop.forward import NotFiniteError
from linearpatch.workshop.harness import (
    GROUPS,
    OFFLINE,
    PAPER,
    check_memory,
    evaluate_tasks,
    load_tasks,
    memory_needed,
    task_names,
    tasks_path,
)
from linearpatch.workshop.places import playground_path
from linearpatch.workshop.retention import retained


def items(task):
    return [
        json.loads(line)
        for line in (tasks_path() / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


@pytest.fixture(scope="module")
def playground():
    return load_playground()


@pytest.fixture(scope="module")
def loaded():
    return load_tasks("offline")


@pytest.fixture(scope="module")
def dense(playground, loaded):
    return evaluate_tasks(*playground, loaded, batch_size=64)


# The suite


def test_the_script_gives_the_shipped_files():
    spec = importlib.util.spec_from_file_location("make_tasks", root / "tools" / "make_tasks.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = {name: text.encode() for name, text in script.files().items()}
    assert made == {
        p.name: p.read_bytes() for p in tasks_path().iterdir() if p.suffix in (".yaml", ".jsonl")
    }


def test_size_of_the_suite():
    assert len(OFFLINE) >= 8 and all(len(items(t)) >= 150 for t in OFFLINE)


@pytest.mark.parametrize("task", OFFLINE)
def test_items(task):
    rows = items(task)
    assert len({(r["story"], *sorted(r["choices"])) for r in rows}) == len(rows), "an item twice"
    assert sum(r["label"] for r in rows) * 2 == len(rows), (
        "the right answer is as often first as second"
    )
    for r in rows:
        assert len(set(r["choices"])) == 2 and bool(r["story"]) == task.startswith("stories")
        for text in (*r["choices"], *([r["story"]] if r["story"] else [])):
            assert re.fullmatch(r"[A-Z][A-Za-z0-9 ,.]*[.?]", text) and "  " not in text, text


@pytest.mark.parametrize("task", OFFLINE)
def test_words_alone_do_not_help(task):
    "Right and wrong answers hold the same words: their frequencies tell nothing."
    count = lambda wrong: Counter(
        w for r in items(task) for w in re.findall(r"\w+", r["choices"][r["label"] ^ wrong].lower())
    )
    assert count(0) == count(1)


@pytest.mark.parametrize("which", ("playground", "second_model"))
def test_small_models_do_better_than_chance(request, which, loaded, dense):
    scores = (
        dense
        if which == "playground"
        else evaluate_tasks(*request.getfixturevalue(which), loaded, batch_size=64)
    )
    assert set(scores) == set(OFFLINE)
    for task, s in scores.items():
        assert s.value - 1.96 * max(s.stderr, 0.5 / s.n) > 0.5, f"{task}: {s}"


# lm-eval's numbers against our own


def own_hits(model, tokenizer, task):
    "Right or wrong for each item, from the model's own logits, text by text."

    @torch.no_grad()
    def logp(before, text):
        prefix = tokenizer(before)["input_ids"] if before else [tokenizer.bos_token_id]
        ids = prefix + tokenizer(text, add_special_tokens=False)["input_ids"]
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(logits[i - 1, ids[i]].item() for i in range(len(prefix), len(ids)))

    out = []
    for r in items(task):
        if r["story"]:
            value = [logp(r["story"], " " + c) - logp("", " " + c) for c in r["choices"]]
        else:
            value = [logp("", c) for c in r["choices"]]
        out.append(float(value[r["label"]] > value[1 - r["label"]]))
    return tuple(out)


@pytest.mark.parametrize("task", ("pairs_determiner", "pairs_question", "stories_topic"))
def test_same_as_the_models_own_likelihoods(playground, dense, task):
    own = own_hits(*playground, task)
    assert own == dense[task].hits and dense[task].value == sum(own) / len(own)


def test_same_as_lm_evals_summary(playground, loaded, dense):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    names = ("pairs_relative", "stories_person")
    tasks = {n: loaded[n][0] for n in names}
    out = evaluate(
        HFLM(playground[0], tokenizer=playground[1], batch_size=32),
        {"tasks": tasks},
        bootstrap_iters=2,
        log_samples=False,
    )["results"]
    for n in names:
        metric = dense[n].metric
        assert out[n][f"{metric},none"] == pytest.approx(dense[n].value, abs=1e-12)
        assert out[n][f"{metric}_stderr,none"] == pytest.approx(dense[n].stderr, abs=1e-12)


def test_the_command_line_of_lm_eval(tmp_path, playground, dense):
    "On a plain folder, from a working folder of its own."
    args = [
        "--model",
        "hf",
        "--model_args",
        f"pretrained={playground_path()},dtype=float32",
        "--tasks",
        "pairs_article,stories_thing",
        "--include_path",
        str(tasks_path()),
        "--device",
        "cpu",
        "--batch_size",
        "64",
        "--output_path",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *args],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(root), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(
        next((tmp_path / "out").rglob("results*.json")).read_text(encoding="utf-8")
    )["results"]
    for task in ("pairs_article", "stories_thing"):
        assert results[task][f"{dense[task].metric},none"] == pytest.approx(dense[task].value)


def test_a_model_is_left_as_it_was(playground, loaded):
    model, tokenizer = playground
    model.train()
    try:
        evaluate_tasks(model, tokenizer, {"pairs_case": loaded["pairs_case"]}, limit=4)
        assert model.training
    finally:
        model.eval()
    assert tokenizer.pad_token == "<|eos|>"


def test_a_saved_student(tmp_path, playground, loaded):
    "In memory, from its folder, and from the folder of a run: the same, patch included."
    model, tokenizer = playground
    cut = Cut(2, 8)
    student = prune(model, cut, random_patch(cut, 64), share=True)
    some = {t: loaded[t] for t in ("pairs_agreement", "stories_person")}
    there = evaluate_tasks(student, tokenizer, some, limit=60, batch_size=32)
    save_student(student, tmp_path / "run" / "model", tokenizer)
    for folder in (tmp_path / "run" / "model", tmp_path / "run"):
        assert evaluate_tasks(folder, tasks=some, limit=60, batch_size=32) == there
    assert there != evaluate_tasks(
        prune(model, cut, share=True), tokenizer, some, limit=60, batch_size=32
    )


def test_batches_change_nothing(playground, loaded, dense):
    assert (
        evaluate_tasks(*playground, {"pairs_question": loaded["pairs_question"]}, batch_size=7)[
            "pairs_question"
        ]
        == dense["pairs_question"]
    )


def test_a_group_counts_as_one_task(playground, loaded, dense):
    "As mmlu does: all items together."
    group = evaluate_tasks(
        *playground, {"both": loaded["pairs_case"] + loaded["pairs_determiner"]}, batch_size=64
    )["both"]
    assert (
        group.hits == dense["pairs_case"].hits + dense["pairs_determiner"].hits and group.n == 400
    )
    assert group.value == (dense["pairs_case"].value + dense["pairs_determiner"].value) / 2


def test_a_nan_is_named(playground, loaded):
    model = prune(playground[0], Cut(2, 8), random_patch(Cut(2, 8), 64))
    with torch.no_grad():
        model.model.layers[2].linear_patch.weight[3] = math.nan
    with pytest.raises(NotFiniteError, match="item 0 of task pairs_case"):
        evaluate_tasks(model, playground[1], {"pairs_case": loaded["pairs_case"]}, limit=4)


# Results are kept


@pytest.fixture
def counted(monkeypatch):
    "Names of the tasks that lm-eval was asked to run."
    run, names = harness._run_task, []

    def count(lm, task, limit, progress):
        names.append(task.config.task)
        return run(lm, task, limit, progress)

    monkeypatch.setattr(harness, "_run_task", count)
    return names


def test_cache(tmp_path, playground, loaded, counted):
    model, tokenizer = playground
    some = {t: loaded[t] for t in ("pairs_case", "stories_topic")}
    ask = lambda m=model, **kw: evaluate_tasks(
        m, tokenizer, some, **dict(dict(limit=6, cache=tmp_path / "kept"), **kw)
    )
    first = ask()
    assert ask() == first and counted == ["pairs_case", "stories_topic"]
    ask(limit=7), ask(bos=False)
    assert len(counted) == 6, "other settings are other results"
    patch = random_patch(Cut(2, 8), 64)
    ask(prune(model, Cut(2, 8), share=True)), ask(prune(model, Cut(2, 8), patch, share=True))
    patch.matrix[5, 5] += 1e-6
    ask(prune(model, Cut(2, 8), patch, share=True))
    assert len(counted) == 12, "another model, or another patch by a hair, is another model"
    model.config.rms_norm_eps *= 2
    ask()
    assert len(counted) == 14, "settings that decide the logits are part of what a model is"
    model.config.rms_norm_eps /= 2
    model.config._name_or_path = "elsewhere"
    assert ask() == first and len(counted) == 14, "where it lies is not"
    assert {p.suffix for p in (tmp_path / "kept").iterdir()} == {".json"}


def test_a_broken_file_is_computed_again(tmp_path, playground, loaded, counted):
    ask = lambda: evaluate_tasks(
        *playground, {"pairs_case": loaded["pairs_case"]}, limit=6, cache=tmp_path
    )
    first = ask()
    [file] = tmp_path.iterdir()
    file.write_text(file.read_text()[:20])
    assert ask() == first and ask() == first and len(counted) == 2
    file.write_text("[1, 2]")
    assert ask() == first and ask() == first and len(counted) == 3


def test_interrupted(tmp_path, playground, loaded, counted, monkeypatch):
    "What was finished before Ctrl-C is not run again."
    count = harness._run_task

    def stop(lm, task, limit, progress):
        if task.config.task == "pairs_order":
            raise KeyboardInterrupt
        return count(lm, task, limit, progress)

    some = {t: loaded[t] for t in ("pairs_case", "pairs_numeral", "pairs_order", "pairs_article")}
    ask = lambda: evaluate_tasks(*playground, some, limit=6, cache=tmp_path)
    with monkeypatch.context() as m:
        m.setattr(harness, "_run_task", stop)
        with pytest.raises(KeyboardInterrupt):
            ask()
    assert counted == ["pairs_case", "pairs_numeral"] and len(list(tmp_path.iterdir())) == 2
    assert set(ask()) == set(some) and counted == [
        "pairs_case",
        "pairs_numeral",
        "pairs_order",
        "pairs_article",
    ]


# Bad input


@pytest.fixture
def no_weights(monkeypatch):
    "Loading a model is an error."

    def refuse(*_, **__):
        raise AssertionError("weights were read")

    for name in ("load_model", "load_student"):
        monkeypatch.setattr(harness, name, refuse)


def test_groups_and_names():
    assert task_names("offline") == list(OFFLINE) and task_names(
        ["pairs_case,pairs_order", "pairs_case"]
    ) == ["pairs_case", "pairs_order"]
    assert (
        GROUPS["paper"] == tuple(PAPER)
        and len(PAPER) == 9
        and [t for t, m in PAPER.items() if m == "acc_norm"]
        == ["arc_challenge", "arc_easy", "hellaswag", "piqa"]
    )
    with pytest.raises(ValueError, match="no task is named"):
        task_names([])


def test_unknown_task(no_weights):
    with pytest.raises(ValueError, match="no task 'helaswag': perhaps hellaswag"):
        evaluate_tasks(playground_path(), tasks="helaswag")
    with pytest.raises(ValueError, match="no task 'offlin': perhaps offline"):
        evaluate_tasks(playground_path(), tasks=["offlin"])
    assert task_names("mmlu,paper") == ["mmlu", *PAPER]


def test_data_out_of_reach(no_weights):
    with pytest.raises(
        ValueError, match="data of task 'hellaswag' cannot be read.*HF_HUB_OFFLINE.*'offline'"
    ):
        evaluate_tasks(playground_path(), tasks=["pairs_case", "hellaswag"])


def test_too_little_memory(no_weights, monkeypatch):
    monkeypatch.setattr(harness, "get_max_memory", lambda: {"cpu": 2**20})
    with pytest.raises(
        ValueError,
        match=r"about .* GiB of memory are needed \(.* for the weights.* smaller batch_size",
    ):
        evaluate_tasks(playground_path(), tasks="pairs_case")


def test_memory_needed(playground):
    model, _ = playground
    need = memory_needed(model.config, "float32", batch_size=4, seq_len=100)
    assert (
        need["weights"] == 4 * sum(p.numel() for p in model.parameters())
        and need["logits"] == 2 * 4 * 100 * 2048 * 4
    )
    seven = memory_needed(LlamaConfig(), "bfloat16", 1, 2048)  # the defaults are LLaMA-7B's
    assert 13.4e9 < seven["weights"] < 13.5e9
    monkey = {"cpu": 2**30, 0: 2**40}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(harness, "get_max_memory", lambda: monkey)
        with pytest.raises(ValueError, match="12.8 GiB of memory are needed"):
            check_memory(seven)
        check_memory(seven, "auto"), check_memory(seven, "cuda")


def test_bad_numbers(playground, loaded):
    for bad in (dict(limit=0), dict(batch_size=0)):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}=0"):
            evaluate_tasks(*playground, loaded, **bad)
    with pytest.raises(ValueError, match="num_fewshot=-1"):
        evaluate_tasks(*playground, "pairs_case", num_fewshot=-1)
    with pytest.raises(ValueError, match="needs its tokenizer"):
        evaluate_tasks(playground[0], tasks=loaded)


def test_without_lm_eval(playground, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(ValueError, match=r"pip install 'linearpatch\[eval\]'"):
        evaluate_tasks(*playground, "pairs_case")


def test_examples_before_the_question(playground):
    "Few-shot: other texts, other numbers; MMLU has five without being asked."
    zero, two = (load_tasks("pairs_numeral", n)["pairs_numeral"][0] for n in (None, 2))
    assert (
        zero.config.num_fewshot == 0
        and two.config.num_fewshot == 2
        and harness.FEWSHOT == {"mmlu": 5}
    )
    a, b = (evaluate_tasks(*playground, {"pairs_numeral": [t]}, limit=40) for t in (zero, two))
    assert a != b and b == evaluate_tasks(*playground, {"pairs_numeral": [two]}, limit=40)


# The commands


def cli(capsys, *words):
    from linearpatch.workshop.cli import main

    with pytest.raises(SystemExit) as e:
        main([str(w) for w in words])
    out, err = capsys.readouterr()
    return e.value.code, out, err


@pytest.fixture
def student_folder(tmp_path, playground):
    "A saved student, where a run would have put it."
    save_student(
        prune(playground[0], Cut(2, 8), random_patch(Cut(2, 8), 64), share=True),
        tmp_path / "six" / "model",
        playground[1],
    )
    return tmp_path / "six"


def test_a_run_with_tasks(tmp_path, playground, loaded):
    from linearpatch.workshop.page import page
    from linearpatch.workshop.pipeline import run_pipeline
    from linearpatch.workshop.report import Report

    settings = dict(
        cuts=("2:8",),
        samples=16,
        batch_size=16,
        calibration="passages",
        eval=("passages",),
        seq_len=128,
        out=tmp_path / "out",
        families=("lstsq",),
    )
    report = run_pipeline(
        *playground,
        **settings,
        tasks=("pairs_case", "stories_person"),
        task_limit=50,
        task_batch_size=50,
    )
    again = Report.load(tmp_path / "out")
    assert again["tasks"] == json.loads(json.dumps(report["tasks"])) and list(
        report["tasks"]["scores"]
    ) == ["dense", "pruned", "lstsq", "hadamard"]
    some = {t: loaded[t] for t in ("pairs_case", "stories_person")}
    a, b = (
        evaluate_tasks(m, playground[1], some, limit=50, batch_size=50)
        for m in (playground[0], prune(playground[0], Cut(2, 8), share=True))
    )
    rp = retained(b, a)
    assert report["tasks"]["retained"]["pruned"] == dict(
        value=rp.value, stderr=rp.stderr, paired=True
    )
    assert (
        report["tasks"]["scores"]["dense"]["stories_person"]["value"] == a["stories_person"].value
    )
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Tasks</h2>" in html and f"<td>{100 * rp.value:.2f}</td>" in html
    without = {k: v for k, v in again.items() if k != "tasks"}
    assert "<h2>Tasks</h2>" not in page(without)
    assert (
        "--tasks pairs_case --tasks stories_person --task-limit 50 --task-batch-size 50"
        in report["command"]
    )
    broken = dict(again, tasks=dict(again["tasks"], retained={"dense": {}}))
    from linearpatch.workshop.schema import check_report

    with pytest.raises(ValueError, match=r"tasks\.retained\.\*\.value"):
        check_report(broken)


def test_a_student_of_nan_is_left_out(playground, loaded):
    from linearpatch.workshop.measuring import measure_tasks
    from linearpatch.workshop.options import RunConfig

    student = prune(playground[0], Cut(2, 8), random_patch(Cut(2, 8), 64))
    with torch.no_grad():
        student.model.layers[2].linear_patch.weight[0] = math.nan
    table = measure_tasks(
        RunConfig(playground[0], task_limit=8),
        *playground,
        {"none": prune(playground[0], Cut(2, 8), share=True), "lstsq": student},
        {"pairs_case": loaded["pairs_case"]},
    )
    assert list(table["scores"]) == ["dense", "pruned"] and "lstsq is left out" in str(table)


def test_evaluate_command(capsys, tmp_path, student_folder, playground, loaded, counted):
    words = [
        "evaluate",
        "playground",
        student_folder,
        "--tasks",
        "pairs_case,pairs_numeral",
        "--limit",
        40,
        "--cache",
        tmp_path / "kept",
    ]
    code, out, _ = cli(capsys, *words, "--out", tmp_path / "table")
    assert code == 0 and len(counted) == 4
    table = json.loads((tmp_path / "table" / "tasks.json").read_text(encoding="utf-8"))
    direct = evaluate_tasks(
        playground[0],
        playground[1],
        {t: loaded[t] for t in ("pairs_case", "pairs_numeral")},
        limit=40,
    )
    assert (
        table["dense"] == "playground"
        and table["scores"]["playground"]["pairs_numeral"]["value"] == direct["pairs_numeral"].value
    )
    assert f"{100 * table['retained']['six']['value']:.2f}" in out and "| RP |" in (
        tmp_path / "table" / "tasks.md"
    ).read_text(encoding="utf-8")
    counted.clear()
    assert cli(capsys, *words)[0] == 0 and counted == [], "nothing is measured twice"
    code, out, _ = cli(capsys, *words, "--pruned", student_folder, "--dense", "playground")
    assert code == 0 and counted == []


def test_evaluate_interrupted(capsys, tmp_path, monkeypatch):
    run = harness._run_task

    def stop(lm, task, limit, progress):
        if task.config.task == "pairs_numeral":
            raise KeyboardInterrupt
        return run(lm, task, limit, progress)

    monkeypatch.setattr(harness, "_run_task", stop)
    code, _, err = cli(
        capsys,
        "evaluate",
        "playground",
        "--tasks",
        "pairs_case,pairs_numeral",
        "--limit",
        4,
        "--cache",
        tmp_path / "kept",
        "--out",
        tmp_path / "table",
    )
    assert code == 130 and f"finished tasks are kept in {tmp_path / 'kept'}" in err
    assert [p.name.split("-")[0] for p in (tmp_path / "kept").iterdir()] == ["pairs_case"] and not (
        tmp_path / "table"
    ).exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["evaluate", "playground", "--tasks", "pairs_cas"],
            "no task 'pairs_cas': perhaps pairs_case",
        ),
        (["evaluate", "no/such/folder"], "there is no folder no/such/folder"),
        (["evaluate", "playground", "--limit", "0"], "limit=0: give 1 or more"),
        (
            ["run", "playground", "--remove", "2", "--tasks", "offlin", "--out", "x"],
            "no task 'offlin': perhaps offline",
        ),
        (
            [
                "run",
                "playground",
                "--remove",
                "2",
                "--tasks",
                "offline",
                "--task-limit",
                "0",
                "--out",
                "x",
            ],
            "--task-limit is 0: give at least 1",
        ),
    ],
)
def test_refused_in_one_line(capsys, tmp_path, monkeypatch, no_weights, words, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(capsys, *words)
    assert (
        code == 2
        and said in err
        and err.count("error:") == 1
        and "Traceback" not in err
        and not (tmp_path / "x").exists()
    )


def test_two_folders_of_one_name(capsys, tmp_path, student_folder):
    shutil.copytree(student_folder, tmp_path / "other" / "six")
    code, _, err = cli(capsys, "evaluate", student_folder, tmp_path / "other" / "six")
    assert code == 2 and "would both be called six" in err


def test_the_demo_takes_tasks():
    from linearpatch.workshop.cli import demo_settings

    assert (
        demo_settings(tasks=("offline",))["tasks"] == ("offline",)
        and demo_settings()["tasks"] == ()
    )


def test_the_demo_takes_tasks_from_its_command_line(monkeypatch):
    import linearpatch as lp
    import linearpatch.workshop.cli as cli

    asked = {}
    monkeypatch.setattr(lp, "run_pipeline", lambda **settings: asked.update(settings))
    monkeypatch.setattr(lp.telling, "tell", lambda *a, **k: None)
    with pytest.raises(SystemExit) as e:
        cli.main(["demo", "--tasks", "offline", "--out", "never"])
    assert (
        e.value.code == 0
        and asked["tasks"] == ("offline",)
        and "--tasks offline" in asked["command"]
    )
