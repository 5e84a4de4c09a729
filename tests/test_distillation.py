"Distillation: the loss, both objectives on every architecture, and runs that are killed."

import copy
import json
import multiprocessing
import random
import shutil
import time

import pytest
import torch
from distilling import CUT, make_cached, matrix, pair, text
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import CONFIGS, FakePatch, fresh as make, liven, random_patch

from linearpatch.method.calibration import Windows, load_windows
from linearpatch.method.distillation import (
    LEARN,
    DistillationError,
    Offline,
    Online,
    distill,
    only_patches_learn,
    top_k_kl,
    top_k_probs,
)
from linearpatch.method.families import fit_patch
from linearpatch.method.folding import fold
from linearpatch.method.hadamard import make_rotation
from linearpatch.method.mismatch import collect
from linearpatch.method.pruning import patch_modules, prune
from linearpatch.shipped.modeling_linearpatch import PatchMatrix
from linearpatch.workshop.checkpoint import load_student, save_student
from linearpatch.workshop.cuts import Cut
from linearpatch.workshop.evaluation import kl_divergence, perplexity
from linearpatch.workshop.forward import run_model, token_kl
from linearpatch.workshop.teacher_cache import cache_teacher


@pytest.fixture
def cached(tmp_path):
    return make_cached(tmp_path)


# ---------------------------------------------------------------- loss


def test_all_tokens_kept_is_the_whole_kl():
    p, q = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0))
    whole, _ = token_kl(p, q, torch.ones(3, 5, dtype=torch.bool))
    torch.testing.assert_close(top_k_kl(q, *top_k_probs(p, 64))[:, :-1], whole)


def test_kept_tokens_are_renormalised_on_both_sides():
    p, q = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(1))
    probs, indices = top_k_probs(p, 5)
    torch.testing.assert_close(probs, p.gather(-1, indices).softmax(-1))
    by_hand = p.softmax(-1).gather(-1, indices), q.softmax(-1).gather(-1, indices)
    a, b = (x / x.sum(-1, keepdim=True) for x in by_hand)
    torch.testing.assert_close(top_k_kl(q, probs, indices), (a * (a / b).log()).sum(-1))
    assert (probs.diff(dim=-1) <= 0).all() and torch.allclose(
        top_k_kl(p, probs, indices), torch.zeros(4), atol=1e-6
    )


# ---------------------------------------------------------------- objectives


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cut", [Cut(0, 2), Cut(2, 4), Cut(4, 6)], ids=str)
def test_online_is_the_whole_student_against_the_whole_teacher(name, cut):
    teacher, student = pair(name, cut)
    windows, weight = text(4, padded=name not in ("gpt-neo",)), patch_modules(student)[0].weight
    for p in student.parameters():
        p.requires_grad_(p is weight)
    kl, counted = Online(student, windows, teacher)([0, 1, 2, 3])
    (gradient,) = torch.autograd.grad(kl[counted].mean(), weight)
    with torch.no_grad():
        target = run_model(teacher, windows.ids, windows.mask)
    naive, _ = token_kl(target, run_model(student, windows.ids, windows.mask), windows.mask)
    (expected,) = torch.autograd.grad(naive[counted].mean(), weight)
    torch.testing.assert_close(kl[counted], naive[counted], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-3)
    assert gradient.abs().max() > 0


def test_offline_with_everything_kept_is_online(tmp_path):
    teacher, student = pair()
    cache = cache_teacher(teacher, text(), tmp_path / "c", top_k=64, batch_size=8)
    with torch.no_grad():
        a, b = Offline(student, cache)([3, 1])[0], Online(student, text(), teacher)([3, 1])[0]
    torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_training_lowers_the_distance_and_nothing_else_moves(cached, mode):
    teacher, student, cache = cached
    frozen = {k: p.clone() for k, p in student.state_dict().items() if "linear_patch" not in k}
    flags, start = (
        {k: p.requires_grad for k, p in student.named_parameters()},
        kl_divergence(teacher, student, text()),
    )
    out = distill(
        student,
        *((cache,) if mode == "offline" else (text(), teacher)),
        lr=1e-2,
        batch_size=4,
        epochs=4,
    )
    assert (
        kl_divergence(teacher, student, text()) < 0.7 * start
        and out.mode == mode
        and out.steps == out.total == 4 * 6
    )
    assert out.windows == 22 and out.heldout == 2 and out.tokens == 4 * 22 * 12
    assert all(torch.equal(p, frozen[k]) for k, p in student.state_dict().items() if k in frozen)
    assert {k: p.requires_grad for k, p in student.named_parameters()} == flags
    assert type(patch_modules(student)[0]) is PatchMatrix
    assert student.config.linearpatch["distilled"] == dict(mode=mode, steps=24, best=out.best)


def test_several_patches_learn_at_once():
    teacher, cuts = make("llama"), [Cut(1, 2), Cut(3, 5)]
    student = prune(teacher, cuts, [random_patch(c) for c in cuts], share=True)
    before, start = (
        [p.weight.detach().clone() for p in patch_modules(student)],
        kl_divergence(teacher, student, text()),
    )
    distill(student, text(), teacher, lr=1e-2, batch_size=4, epochs=2)
    assert kl_divergence(teacher, student, text()) < start and all(
        not torch.equal(a, p.weight) for a, p in zip(before, patch_modules(student))
    )


def test_trained_student_is_saved_and_loaded(cached, tmp_path):
    _, student, cache = cached
    distill(student, cache, lr=1e-2, batch_size=4)
    save_student(student, tmp_path / "s")
    again = load_student(tmp_path / "s")
    assert (
        torch.equal(matrix(again), matrix(student))
        and again.config.linearpatch["distilled"]["mode"] == "offline"
    )


# ---------------------------------------------------------------- what learns, and how


@pytest.mark.parametrize("learn", LEARN)
def test_every_choice_begins_at_the_start_and_stays_in_its_kind(learn):
    teacher, student = pair()
    start = matrix(student)
    with only_patches_learn(student, learn, rank=3) as learning:
        assert torch.equal(patch_modules(student)[0].weight, start)
        assert (
            sum(p.numel() for p in learning.values())
            == dict(full=32 * 32, diagonal=32, rotation=32 * 32 + 1, **{"low-rank": 2 * 32 * 3})[
                learn
            ]
        )
        assert [k for k, p in student.named_parameters() if p.requires_grad] == [
            f"model.layers.2.linear_patch.parametrizations.weight.0.{k[2:]}" for k in learning
        ]
    distill(student, text(), teacher, lr=1e-2, batch_size=4, learn=learn, rank=3)
    change = (matrix(student) - start).double()
    assert change.norm() > 1e-2
    if learn == "low-rank":
        assert torch.linalg.matrix_rank(change, rtol=1e-4) == 3
    if learn == "diagonal":
        H = make_rotation(32).dense(torch.float64)
        turned = H.T @ change @ H
        assert (turned - turned.diag().diag()).abs().max() < 1e-5 * turned.abs().max() + 1e-6


def test_weight_decay_pulls_toward_the_start_not_toward_zero():
    moved = {}
    for decay in (0.0, 50.0):
        teacher, student = pair()
        start = matrix(student)
        distill(student, text(), teacher, lr=1e-2, batch_size=4, epochs=4, weight_decay=decay)
        moved[decay] = (matrix(student) - start).norm().item()
    assert moved[50.0] < 0.5 * moved[0.0]


@pytest.mark.parametrize(
    "other",
    [dict(batch_size=2, accumulate=4), dict(batch_size=8, gradient_checkpointing=True)],
    ids=str,
)
def test_same_step_computed_otherwise(other):
    results = []
    for how in (dict(batch_size=8), other):
        teacher, student = pair()
        distill(student, text(padded=True), teacher, lr=1e-2, epochs=2, **how)
        results.append(matrix(student))
        assert not any("forward" in vars(m) for m in teacher.modules())
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-4)


def test_padding_does_not_count():
    teacher, student = pair()
    short, long = text(12), text(12)
    long = Windows(
        torch.cat([long.ids, torch.full((12, 5), 7)], 1),
        torch.cat([long.mask, torch.zeros(12, 5, dtype=torch.bool)], 1),
        bos=False,
    )
    found = []
    for w in (short, long):
        teacher, student = pair()
        found.append(distill(student, w, teacher, lr=1e-2, batch_size=4).history[-1]["heldout"])
    assert abs(found[0] - found[1]) < 1e-4


def test_half_precision_model_learns_in_float32():
    teacher = make("llama").to(torch.bfloat16)
    student = prune(teacher, [CUT], [random_patch(CUT)], share=True)
    seen, start = set(), kl_divergence(teacher, student, text())
    watch = lambda record: seen.add(patch_modules(student)[0].weight.dtype)
    distill(
        student,
        text(),
        teacher,
        lr=1e-2,
        batch_size=4,
        epochs=2,
        autocast="bfloat16",
        callback=watch,
    )
    assert (
        seen == {torch.float32} == {patch_modules(student)[0].weight.dtype}
        and student.lm_head.weight.dtype == torch.bfloat16
    )
    assert kl_divergence(teacher, student, text()) < start


def test_best_patch_is_kept_and_training_stops_early():
    teacher, student = pair()
    out = distill(student, text(), teacher, lr=3.0, batch_size=4, epochs=10, patience=2, evals=20)
    best = min(r["heldout"] for r in out.history)
    assert out.steps < out.total and out.best == next(
        r["step"] for r in out.history if r["heldout"] == best
    )
    aside = sorted(torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()[:2])
    assert abs(kl_divergence(teacher, student, text()[aside]) - best) < 1e-4


def test_callback_sees_every_step():
    teacher, student = pair()
    seen = []
    out = distill(student, text(), teacher, lr=1e-2, batch_size=4, evals=3, callback=seen.append)
    assert [r["step"] for r in seen] == list(range(1, 7)) and all(
        r["loss"] > 0 and r["tokens_per_second"] > 0 for r in seen
    )
    assert (
        [r["step"] for r in seen if r["heldout"] is not None]
        == [2, 4, 6]
        == [r["step"] for r in out.history[1:]]
    )
    rates = [r["lr"] for r in seen]
    assert rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(0.05 * 1e-2)


@pytest.mark.parametrize(
    "bad,word",
    [
        (dict(lr=0), "lr is 0"),
        (dict(lr=float("nan")), "lr is nan"),
        (dict(epochs=0), "epochs is 0"),
        (dict(epochs=1.5), "epochs is 1.5.*whole"),
        (dict(clip=0), "clip is 0"),
        (dict(autocast="float16"), "autocast"),
        (dict(batch_size=-1), "batch_size is -1"),
        (dict(learn="some"), "choose one of"),
        (dict(autocast="int8"), "autocast"),
        (dict(heldout=24), "nothing is left"),
        (dict(save_every=0), "save_every"),
        (dict(resume=True), "needs the folder"),
        (dict(teacher=None), "needs the intact model"),
    ],
)
def test_bad_settings_change_nothing(bad, word):
    teacher, student = pair()
    before = matrix(student)
    with pytest.raises(ValueError, match=word):
        distill(student, text(), **dict(teacher=teacher) | bad)
    assert torch.equal(matrix(student), before)
    assert type(patch_modules(student)[0]) is PatchMatrix


def test_loss_that_is_not_finite_stops_with_the_best_patch(tmp_path):
    teacher, student = pair()

    def poison(record):
        if record["step"] == 4:
            teacher.lm_head.weight.data[5] = float("nan")

    reference = copy.deepcopy(student)
    with pytest.raises(DistillationError, match="not finite .* at step 5, windows .*smaller lr"):
        distill(
            student,
            text(),
            teacher,
            lr=1e-2,
            batch_size=4,
            evals=6,
            checkpoint=tmp_path,
            callback=poison,
        )
    clean = make("llama")
    with pytest.raises(ValueError, match="met a number that is not finite: delete that file"):
        distill(
            pair()[1],
            text(),
            make("llama"),
            lr=1e-2,
            batch_size=4,
            evals=6,
            checkpoint=tmp_path,
            resume=True,
        )
    assert (tmp_path / "state.safetensors").is_file() and matrix(student).isfinite().all()
    assert (
        not torch.equal(matrix(student), matrix(reference)) and len(list(tmp_path.iterdir())) == 1
    )
    teacher.load_state_dict(clean.state_dict())
    assert kl_divergence(clean, student, text()) < kl_divergence(clean, reference, text())


# ---------------------------------------------------------------- interrupted


def test_checkpoint_of_another_run_is_refused(tmp_path):
    teacher, student = pair()
    distill(student, text(), teacher, lr=1e-2, batch_size=4, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="holds the state of another run"):
        distill(pair()[1], text(), teacher, lr=1e-2, batch_size=4, checkpoint=tmp_path)
    for change, word in (
        (dict(lr=2e-2), "its lr is 0.01, not 0.02"),
        (dict(seed=3), "its seed is 0, not 3"),
    ):
        with pytest.raises(ValueError, match=word):
            distill(
                pair()[1],
                text(),
                teacher,
                **dict(lr=1e-2, batch_size=4, checkpoint=tmp_path, resume=True) | change,
            )
    other = prune(teacher, [Cut(1, 3)], [random_patch(Cut(1, 3))], share=True)
    with pytest.raises(ValueError, match="its cuts is"):
        distill(other, text(), teacher, lr=1e-2, batch_size=4, checkpoint=tmp_path, resume=True)
    other = pair()[1]
    other.config.linearpatch["patches"][0]["family"] = "lstsq"
    with pytest.raises(ValueError, match="its patches is"):
        distill(other, text(), teacher, lr=1e-2, batch_size=4, checkpoint=tmp_path, resume=True)
    result = matrix(
        student
    )  # a finished run, and a student that training has moved: the state holds the start
    distill(student, text(), teacher, lr=1e-2, batch_size=4, checkpoint=tmp_path, resume=True)
    assert torch.equal(matrix(student), result)
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is corrupt"):
        distill(pair()[1], text(), teacher, lr=1e-2, batch_size=4, checkpoint=tmp_path, resume=True)


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(version=2), "version"),
        (dict(n="many"), "n"),
        (dict(out=dict(mode="online")), "out.settings"),
        (dict(extra=1), "extra"),
        (dict(identity=None), "identity"),
    ],
)
def test_malformed_state_says_what_is_wrong(tmp_path, change, word):
    common = dict(lr=1e-2, batch_size=4, checkpoint=tmp_path)
    teacher, student = pair()
    distill(student, text(), teacher, **common)
    path = tmp_path / "state.safetensors"
    with safe_open(path, framework="pt") as f:
        record = json.loads(f.metadata()["run"])
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata=dict(run=json.dumps(record | change)))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"is corrupt \({word}: .*delete it and begin anew"):
        distill(pair()[1], text(), teacher, resume=True, **common)
    assert path.read_bytes() == before


def test_a_state_without_a_version_is_of_the_first_one(tmp_path):
    common = dict(lr=1e-2, batch_size=4, checkpoint=tmp_path)
    teacher, student = pair()
    distill(student, text(), teacher, **common)
    path = tmp_path / "state.safetensors"
    with safe_open(path, framework="pt") as f:
        record = json.loads(f.metadata()["run"])
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    del record["version"]
    save_file(tensors, path, metadata=dict(run=json.dumps(record)))
    again = pair()[1]
    distill(again, text(), teacher, resume=True, **common)
    assert torch.equal(matrix(again), matrix(student))


def work(folder, mode):
    "What is killed: cache, train, save; from the beginning each time, as a new process would."
    torch.set_num_threads(1)
    teacher, student = pair()
    common = dict(
        lr=1e-2,
        batch_size=2,
        epochs=5,
        learn="low-rank",
        checkpoint=folder / "state",
        resume=True,
        save_every=3,
    )
    if mode == "online":
        out = distill(student, text(), teacher, **common)
    else:
        out = distill(
            student,
            cache_teacher(teacher, text(), folder / "cache", top_k=10, shard_windows=2),
            **common,
        )
    torch.save(
        dict(weight=matrix(student), history=out.history, best=out.best), folder / "result.pt"
    )


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_killed_twenty_times_it_ends_with_the_same_patch(tmp_path, mode):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    context = multiprocessing.get_context("forkserver")
    preload = ["linearpatch.workshop.teacher_cache", "linearpatch.method.pruning", "tiny"]
    context.set_forkserver_preload(preload)
    for _ in range(2):  # the first one starts the server
        if (whole / "state").exists():
            shutil.rmtree(whole)
            whole.mkdir()
        started = time.perf_counter()
        process = context.Process(target=work, args=(whole, mode))
        process.start()
        process.join()
    long, chance, kills = time.perf_counter() - started, random.Random(0), 0
    while kills < 20:
        process = context.Process(target=work, args=(killed, mode))
        process.start()
        process.join(chance.uniform(0.3, 0.8) * long)
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        if (
            killed / "result.pt"
        ).exists():  # done before its time: begin again, until there were twenty
            shutil.rmtree(killed)
            killed.mkdir()
    process = context.Process(target=work, args=(killed, mode))
    process.start()
    process.join()
    a, b = torch.load(whole / "result.pt"), torch.load(killed / "result.pt")
    assert (
        torch.equal(a["weight"], b["weight"])
        and a["history"] == b["history"]
        and a["best"] == b["best"]
    )
    if mode == "offline":
        files = [
            {f.name: f.read_bytes() for f in (d / "cache").iterdir() if not f.name.startswith(".")}
            for d in (whole, killed)
        ]
        assert files[0] == files[1] and len(files[0]) == 13


# ---------------------------------------------------------------- trained models


@pytest.mark.parametrize("mode", ["offline", "online"])
@pytest.mark.parametrize("n", [3, 4])
def test_a_trained_model_gains_at_its_best_cuts(second_model, tmp_path, mode, n):
    teacher, tokenizer = second_model
    windows = load_windows("passages", tokenizer, seq_len=128, samples=160)
    heldout = load_windows("passages", tokenizer, split="heldout", seq_len=128, samples=None)
    stats = collect(teacher, windows, n_remove=n, rotation=make_rotation(64), batch_size=16)
    source = (
        cache_teacher(teacher, windows, tmp_path / "c", batch_size=16)
        if mode == "offline"
        else windows
    )
    for cut in sorted(stats.cosine, key=stats.cosine.get)[-2:]:
        student = prune(teacher, cut, fit_patch(stats, cut), share=True)
        free = perplexity(student, heldout, batch_size=16)
        distill(student, source, teacher, lr=1e-2, batch_size=4)
        assert perplexity(student, heldout, batch_size=16) < 0.93 * free


def test_a_trained_rotation_stays_one_and_folds():
    teacher = liven(
        make("llama")
    )  # at its first weights the stream is so small that a norm's epsilon shows
    Q = torch.linalg.qr(
        torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )[0]
    student = prune(
        teacher, Cut(2, 4), FakePatch(1.3 * Q, Cut(2, 4), "procrustes"), share=True, dtype="float32"
    )
    distill(student, text(), teacher, lr=1e-2, batch_size=4, learn="rotation")
    P = patch_modules(student)[0].weight.double()
    assert (P - 1.3 * Q.T).norm() > 0.01 * P.norm()
    torch.testing.assert_close(
        P @ P.T, (P @ P.T).diagonal().mean() * torch.eye(32).double(), atol=1e-5, rtol=0
    )
    folded = fold(student)
    with torch.no_grad():
        torch.testing.assert_close(
            folded(text().ids[:2]).logits, student(text().ids[:2]).logits, atol=1e-4, rtol=1e-4
        )
    assert folded.folding.exact
