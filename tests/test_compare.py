"Rivals: the same numbers by another road, every method on other architectures, all or nothing."

import copy
import json
import math
import time

import pytest
import torch
import torch.nn.functional as F
from tiny import make

from linearpatch.method.calibration import Windows, load_windows
from linearpatch.method.distillation import Online
from linearpatch.method.families import fit_patch
from linearpatch.method.fusion import Patch
from linearpatch.method.mismatch import collect
from linearpatch.method.models import decoder_layers, load_playground, n_layers, remove_layers
from linearpatch.method.pruning import prune
from linearpatch.method.selection import select
from linearpatch.workshop import compare as module
from linearpatch.workshop.checkpoint import save_student
from linearpatch.workshop.compare import SHORT, compare, run_comparison
from linearpatch.workshop.cuts import Cut
from linearpatch.workshop.evaluation import kl_divergence, perplexity, score_students
from linearpatch.workshop.forward import NotFiniteError, layer_states
from linearpatch.workshop.options import RunConfig
from linearpatch.workshop.rivals import BEST, FOLDS, METHODS, choose_methods
from linearpatch.workshop.saved import student_over_teacher
from linearpatch.workshop.students import measured
from linearpatch.workshop.treatments import (
    by_compensation,
    fit_mlp_cosine,
    sample_states,
    train_layer,
)


@pytest.fixture(scope="module")
def world():
    model, tokenizer = load_playground()
    calibration = load_windows("passages", tokenizer, seq_len=64, samples=32)
    heldout = load_windows("passages", tokenizer, split="heldout", seq_len=64, samples=None)[:12]
    return model, tokenizer, calibration, heldout


@pytest.fixture(scope="module")
def result(world):
    model, tokenizer, calibration, heldout = world
    return compare(
        model,
        calibration,
        {"text": heldout},
        4,
        skip=["sleb", "sleb-patched"],
        batch_size=16,
        layer=dict(epochs=1),
    )


def random_text(n=6, seq_len=12, vocab=64):
    return Windows(
        torch.randint(3, vocab, (n, seq_len), generator=torch.Generator().manual_seed(1)),
        source="random",
    )


def test_rows_are_what_perplexity_and_kl_say(world, result):
    model, _, calibration, heldout = world
    assert result.dense["text"] == pytest.approx(perplexity(model, heldout), rel=1e-5)
    for name, family, averaging in (
        ("linearpatch", "hadamard", "ratio-of-means"),
        ("ghosted", "unweighted", "ratio-of-means"),
        ("ours", "joint", "ratio-of-means"),
        ("replaceme", "mlp", "ratio-of-means"),
        ("linearpatch-code", "hadamard", "mean-of-ratios"),
        ("shortgpt", None, ""),
    ):
        row = next(r for r in result.results if r.method == name)
        cuts = [Cut(*c) for c in row.cuts]
        stats = collect(model, calibration, cuts=cuts, moments=cuts, batch_size=8)
        student = prune(
            model, cuts, [fit_patch(stats, c, family, averaging) for c in cuts] if family else None
        )
        assert row.perplexity["text"] == pytest.approx(perplexity(student, heldout), rel=1e-3)
        assert row.kl["text"] == pytest.approx(kl_divergence(model, student, heldout), abs=1e-3)
        plain = sum(p.numel() for p in remove_layers(model, cuts).parameters())
        assert row.extra == sum(p.numel() for p in student.parameters()) - plain


def test_each_method_is_there_at_the_common_cut_and_at_its_own(world, result):
    model, _, calibration, _ = world
    stats = collect(model, calibration, n_remove=4, batch_size=16)
    [common] = select(stats=stats, n_remove=4).cuts
    influence = select(stats=stats, n_remove=4, metric="influence").cuts
    assert [[c.start, c.stop] for c in influence] == result.row("shortgpt, own").cuts
    for m in choose_methods(skip=["sleb", "sleb-patched"]):
        rows = [r for r in result.results if r.method == m.name]
        assert (
            any(r.where == "own" for r in rows)
            if m.own_only
            else [r.cuts for r in rows if r.where == "common"] == [[[common.start, common.stop]]]
        )
    values = [r.perplexity["text"] for r in result.results]
    assert values == sorted(values) and result["text"]["ours"] == result["ours"].perplexity["text"]


def test_one_pass_of_the_teacher_for_all_students(world):
    model, _, _, heldout = world
    teacher, calls = copy.deepcopy(model), []
    students = {i: prune(model, Cut(i, i + 2), share=True) for i in (2, 5)}
    teacher.register_forward_hook(lambda *a: calls.append(1))
    dense, scores = score_students(teacher, students, heldout, batch_size=12, kl_windows=5)
    assert len(calls) == 1 and dense == pytest.approx(perplexity(model, heldout), rel=1e-5)
    for name, s in students.items():
        assert scores[name][0] == pytest.approx(perplexity(s, heldout), rel=1e-5)
        assert scores[name][1] == pytest.approx(kl_divergence(model, s, heldout[:5]), abs=1e-5)


def test_a_student_that_overflows_is_nan_and_a_teacher_an_error(world):
    model, _, _, heldout = world
    broken = copy.deepcopy(model)
    with torch.no_grad():
        decoder_layers(broken)[3].mlp.down_proj.weight[:] = math.nan
    dense, scores = score_students(model, {"broken": broken, "same": model}, heldout)
    assert math.isnan(scores["broken"][0]) and math.isnan(scores["broken"][1])
    assert scores["same"][0] == dense and abs(scores["same"][1]) < 1e-6
    with pytest.raises(NotFiniteError, match="intact model"):
        score_students(broken, {"same": model}, heldout)


def test_cosine_objective_beats_least_squares_at_its_own_game(world):
    model, _, calibration, _ = world
    cut = Cut(4, 8)
    stats = collect(model, calibration, cuts=[cut], moments=[cut], batch_size=16)
    X = {}
    with torch.no_grad(), layer_states(model, lambda l, x: X.update({l: x})):
        model.base_model(calibration.ids)
    m = []
    handle = decoder_layers(model)[3].mlp.register_forward_hook(lambda mod, a, out: m.append(out))
    with torch.no_grad():
        model.base_model(calibration.ids)
    handle.remove()
    cosine = lambda p: (
        F.cosine_similarity(p.apply(X[4], m[0]), X[8], dim=-1).mean().item()
    )  # over all tokens
    eye = Patch(torch.eye(64, dtype=torch.float64), "none", cut)
    everything = fit_mlp_cosine(model, calibration, stats, cut, batch_size=16)
    assert cosine(eye) + 0.01 < cosine(fit_patch(stats, cut, "mlp")) < cosine(everything)
    x, u, y = sample_states(model, calibration, cut, tokens=300, batch_size=7)
    assert len(x) == len(u) == len(y) == 300 and not torch.equal(x, y)
    assert (
        (y[:, None] == X[8].flatten(0, 1)[None]).all(-1).any(1).all()
    )  # rows of the stream, none made up


def test_the_trained_layer_imitates_the_block(world):
    model, _, calibration, heldout = world
    before, cut = copy.deepcopy(model.state_dict()), Cut(3, 7)
    student, losses = train_layer(model, calibration, cut, epochs=2, batch_size=8)
    assert n_layers(student) == n_layers(model) - 3
    assert all(
        torch.equal(v, before[k]) for k, v in model.state_dict().items()
    )  # the teacher keeps its weights

    def state(m, l):
        X = {}
        with torch.no_grad(), layer_states(m, lambda l, x: X.update({l: x})):
            m.base_model(heldout.ids)
        return X[l]

    def distance(m):
        return (state(model, 7) - state(m, 4)).square().sum(-1).mean().item()

    untrained = remove_layers(model, Cut(4, 7), share=True)
    assert losses[1] < losses[0] and distance(student) < 0.97 * distance(untrained)
    with pytest.raises(ValueError, match="removes nothing"):
        train_layer(model, calibration, Cut(3, 4))
    with pytest.raises(NotFiniteError, match="smaller learning rate"):
        train_layer(model, calibration, cut, lr=1e9)


def test_compensation_step_by_step(world):
    "The intact model, whose removed layers hand on their input times a number measured then."
    model, _, calibration, _ = world
    windows, walked, ratio = calibration[:8], copy.deepcopy(model), {}
    chosen = by_compensation(model, windows, 4, batch_size=8)
    layers = decoder_layers(walked)
    for layer in chosen.info["order"]:
        sizes = {}
        look = layers[layer].register_forward_hook(
            lambda m, args, kwargs, out: sizes.update(
                r=(out if torch.is_tensor(out) else out[0]).abs().sum()
                / (args[0] if args else kwargs["hidden_states"]).abs().sum()
            ),
            with_kwargs=True,
        )
        with torch.no_grad():
            walked.base_model(windows.ids)
        look.remove()
        ratio[layer] = sizes["r"].item()

        def scale(m, args, kwargs, out, r=ratio[layer]):
            h = r * (args[0] if args else kwargs["hidden_states"])
            return h if torch.is_tensor(out) else (h, *out[1:])

        layers[layer].register_forward_hook(scale, with_kwargs=True)
    assert len(chosen.layers) == 4 and any(c.n > 1 for c in chosen.cuts)
    for c, f in zip(chosen.cuts, chosen.info["factors"]):
        assert f == pytest.approx(math.prod(ratio[l] for l in c), rel=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_every_method_on_other_architectures(name):
    model, text = make(name), random_text()
    before = copy.deepcopy(model.state_dict())
    result = compare(
        model,
        text,
        {"text": text},
        2,
        batch_size=6,
        distill="online",
        training=dict(SHORT, epochs=1),
        layer=dict(epochs=1),
    )
    assert {r.method for r in result.results} == {m.name for m in METHODS}
    assert all(math.isfinite(r.perplexity["text"]) and r.kl["text"] > -1e-6 for r in result.results)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for name_ in ("replaceme", "replaceme-cosine", "foldable", "ours"):
        assert any(n.startswith(f"{name_} fits no matrix for the MLP") for n in result.notes) == (
            name == "gemma2" or result[name_].cuts[0][0] == 0
        )
    assert {r.method for r in result.results if r.distilled} >= {
        "linearpatch",
        "ghosted",
        "diagonal",
    }
    assert "replaceme" in result.notes[-1] and "Not distilled" in result.notes[-1]


def test_distillation_feeds_the_student_its_own_mlp(world):
    "The MLP before the cut is not the teacher's: the online loss must begin in front of it."
    model, tokenizer, calibration, _ = world
    cut = Cut(4, 8)
    stats = collect(model, calibration, cuts=[cut], moments=[cut], batch_size=16)
    student = prune(model, cut, [fit_patch(stats, cut, "joint")], share=True, dtype="float32")
    few = calibration[:4]
    kl, counted = Online(student, few, model)(list(range(4)))
    assert kl[counted].mean().item() == pytest.approx(kl_divergence(model, student, few), abs=1e-5)


def test_a_saved_student_with_an_mlp_part_comes_back_over_its_teacher(world, tmp_path):
    model, tokenizer, calibration, _ = world
    cut = Cut(4, 8)
    stats = collect(model, calibration, cuts=[cut], moments=[cut], batch_size=16)
    student = prune(model, cut, [fit_patch(stats, cut, "foldable")])
    save_student(student, tmp_path / "student", tokenizer)
    again = student_over_teacher(RunConfig("playground"), tmp_path / "student", model)
    assert perplexity(again, calibration[:4]) == pytest.approx(
        perplexity(student, calibration[:4]), rel=1e-4
    )
    assert again.config.linearpatch["folded"] == student.config.linearpatch["folded"] != []


def test_distilled_rows_and_what_they_cost(world):
    model, _, calibration, heldout = world
    common = dict(only=["nothing", "linearpatch"], own=False, batch_size=16, training=SHORT)
    online, offline = (
        compare(model, calibration, {"text": heldout}, 4, distill=d, top_k=512, **common)
        for d in ("online", "offline")
    )
    for r in (online, offline):
        assert r["linearpatch, distilled"].perplexity["text"] < r["linearpatch"].perplexity["text"]
        assert (
            r["linearpatch, distilled"].folds == "no"
            and r["linearpatch"].folds == "nearly"
            and r["nothing"].costs == "nothing"
        )
        assert not any(row.method == "nothing" and row.distilled for row in r.results)
    assert online["linearpatch"].perplexity == offline["linearpatch"].perplexity


def test_bad_input():
    with pytest.raises(ValueError, match="perhaps sleb"):
        choose_methods(skip=["slebb"])
    with pytest.raises(ValueError, match="no method is left"):
        choose_methods(only=["ours"], skip=["ours"])
    model, text = make("llama"), random_text()
    for kw, message in (
        (dict(), "give n_remove"),
        (dict(n_remove=2, cut=Cut(1, 3)), "one of the two"),
        (dict(cut=[Cut(1, 2), Cut(3, 4)]), "several cuts"),
        (dict(n_remove=2, distill="yes"), "distill is 'yes'"),
        (dict(n_remove=6), "cannot remove 6"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(model, text, {"text": text}, **kw)
    with pytest.raises(ValueError, match="no text to measure on"):
        compare(model, text, {}, 2)


def test_a_rule_that_cannot_remove_so_many_is_told_not_fatal():
    model, text = make("llama"), random_text()
    result = compare(
        model, text, {"text": text}, 5, only=["nothing", "sleb", "taylor"], batch_size=6
    )
    assert {r.method for r in result.results} == {"nothing"} and sum(
        "could not choose layers" in n for n in result.notes
    ) == 2


def test_one_layer_cannot_be_replaced_by_one_layer():
    model, text = make("llama"), random_text()
    result = compare(model, text, {"text": text}, 1, only=["nothing", "streamline"], batch_size=6)
    assert {r.method for r in result.results} == {"nothing"} and "removes nothing" in result.notes[
        0
    ]


def test_the_same_run_gives_the_same_record(world, tmp_path):
    model, tokenizer, _, _ = world
    settings = dict(
        remove=4,
        samples=8,
        seq_len=32,
        batch_size=8,
        calibration="passages",
        eval=("passages",),
        only=["linearpatch", "streamline"],
        distill="no",
    )
    records = []
    for out in ("a", "b"):
        run_comparison(model, tokenizer, **settings, layer=dict(epochs=1), out=tmp_path / out)
        assert sorted(p.name for p in (tmp_path / out).rglob("*.*")) == [
            "compare.json",
            "compare.md",
            "compare.png",
        ]
        record = json.loads((tmp_path / out / "compare.json").read_text())
        for row in record["results"]:
            del row["seconds"], row["memory"]
        del record["command"]
        records.append(record)
    assert (
        records[0] == records[1] and records[0]["methods"]["streamline"]["source"] == "2403.19135"
    )
    assert "peak MiB" in (tmp_path / "a" / "compare.md").read_text()


def test_retained_performance_is_that_of_the_tasks(world):
    pytest.importorskip("lm_eval")
    from linearpatch.workshop.harness import evaluate_tasks, load_tasks
    from linearpatch.workshop.retention import retained

    model, tokenizer, calibration, heldout = world
    items = load_tasks("pairs_article")
    result = compare(
        model,
        calibration,
        {"text": heldout},
        4,
        only=["linearpatch"],
        own=False,
        tasks=items,
        tokenizer=tokenizer,
        batch_size=16,
    )
    row = result["linearpatch"]
    [cut] = [Cut(*c) for c in row.cuts]
    student = prune(
        model, cut, [fit_patch(collect(model, calibration, cuts=[cut], batch_size=16), cut)]
    )
    again = retained(
        evaluate_tasks(student, tokenizer, items, batch_size=16),
        evaluate_tasks(model, tokenizer, items, batch_size=16),
    )
    assert row.retained["value"] == pytest.approx(again.value, abs=0.02) and "RP, %" in str(result)
    with pytest.raises(ValueError, match="need the tokenizer"):
        compare(model, calibration, {"text": heldout}, 4, tasks=items)


def test_one_window_is_enough_for_every_method(world):
    model, _, calibration, heldout = world
    result = compare(
        model,
        calibration[:1],
        {"text": heldout[:2]},
        4,
        only=["linearpatch", "replaceme", "replaceme-cosine", "foldable", "ours"],
        own=False,
    )
    assert (
        all(math.isfinite(r.perplexity["text"]) for r in result.results)
        and len(result.results) == 5
    )
    # nothing can be validated: the strongest pull toward the typical scale
    ours, theirs = (result[k].perplexity["text"] for k in ("ours", "linearpatch"))
    assert ours < 1.05 * theirs


def test_interrupted_leaves_nothing(world, tmp_path, monkeypatch):
    model, tokenizer, _, _ = world

    def interrupt(*a, **kw):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_score_all", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_comparison(
            model,
            tokenizer,
            remove=2,
            samples=4,
            seq_len=32,
            calibration="passages",
            eval=("passages",),
            only=["linearpatch"],
            distill="no",
            out=tmp_path / "out",
        )
    assert list(tmp_path.iterdir()) == []


def test_memory_of_a_block_is_seen():
    with measured("cpu") as spent:
        block = torch.ones(2**26)
        time.sleep(0.05)
    assert spent["seconds"] >= 0.05 and spent["memory"] > 0.9 * block.numel() * 4
    assert set(FOLDS.values()) == {"yes", "nearly", "no"} and all(
        m.treatment in FOLDS for m in METHODS
    )


def test_the_best_family_beats_the_paper_on_a_model_that_no_chapter_looks_at(second_model):
    model, tokenizer = second_model
    calibration = load_windows("passages", tokenizer, seq_len=128, samples=96)
    heldout = load_windows("passages", tokenizer, split="heldout", seq_len=128, samples=None)[:32]
    stats = collect(model, calibration, n_remove=3, moments="all", batch_size=32)
    cuts = [Cut(s, s + 3) for s in range(1, 6)]
    students = {
        (f, c): prune(model, c, [fit_patch(stats, c, f)], share=True)
        for f in ("hadamard", BEST)
        for c in cuts
    }
    scores = score_students(model, students, heldout, batch_size=16)[1]
    ratio = [scores[BEST, c][0] / scores["hadamard", c][0] for c in cuts]
    assert sum(r < 1 for r in ratio) >= 4 and max(ratio) < 1.01
