"Distillation: the loss, the cache, both objectives on every architecture, and runs that are killed."
import copy, json, multiprocessing, random, time
import pytest, torch
from tiny import CONFIGS, FakePatch, fresh as make, liven, random_patch
from linearpatch import distillation
from linearpatch.calibration import Windows, load_windows
from linearpatch.distillation import (DistillationError, Full, LEARN, Offline, Online, TopKCache, Training, bytes_per_token, cache_teacher, check_room,
                                      distill, find_cache, index_dtype, only_patches_learn, top_k_kl, top_k_probs)
from linearpatch.evaluation import kl_divergence, perplexity
from linearpatch.fusion import fit_patch
from linearpatch.hadamard import make_rotation
from linearpatch.mismatch import collect
from linearpatch.models import Cut, load_model, n_layers
from linearpatch.checkpoint import load_student, save_student
from linearpatch.pruning import patch_modules, prune
from linearpatch.selection import run_model, token_kl

CUT = Cut(2, 4)


def text(n=24, seq_len=12, vocab=64, seed=0, padded=False):
    ids = torch.randint(3, vocab, (n, seq_len), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded: mask[::2, -4:] = False
    return Windows(ids, mask, source="random", bos=False)


def pair(name="llama", cut=CUT):
    teacher = make(name)
    return teacher, prune(teacher, [cut], [random_patch(cut)], share=True)


def matrix(student): return patch_modules(student)[0].weight.detach().clone()


@pytest.fixture
def cached(tmp_path):
    teacher, student = pair()
    return teacher, student, cache_teacher(teacher, text(), tmp_path / "cache", top_k=10, batch_size=4, shard_windows=7)


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
    assert (probs.diff(dim=-1) <= 0).all() and torch.allclose(top_k_kl(p, probs, indices), torch.zeros(4), atol=1e-6)


@pytest.mark.parametrize("vocab,dtype,size", [(200, torch.uint8, 3), (256, torch.uint8, 3), (257, torch.uint16, 4), (65_536, torch.uint16, 4), (65_537, torch.int32, 6)])
def test_smallest_index_that_holds_the_vocabulary(vocab, dtype, size):
    assert index_dtype(vocab) == dtype and bytes_per_token(vocab, 100) == 100 * size
    assert torch.tensor([vocab - 1]).to(dtype).long().item() == vocab - 1


# ---------------------------------------------------------------- cache

@pytest.mark.parametrize("dtype", distillation.CACHE_DTYPES)
def test_cache_gives_back_what_the_teacher_said_in_any_order(tmp_path, dtype):
    teacher, windows, rows = make("llama"), text(padded=True), [23, 0, 8, 7, 14]
    cache = cache_teacher(teacher, windows, tmp_path / "c", top_k=10, dtype=dtype, batch_size=4, shard_windows=7)
    ids, mask, probs, indices = cache[rows]
    with torch.no_grad(): p, i = top_k_probs(run_model(teacher, windows.ids[rows], windows.mask[rows])[:, :-1], 10)
    real = windows.mask[rows][:, 1:]
    assert len(cache) == 24 and len(cache.manifest["shards"]) == 4 and str(probs.dtype) == f"torch.{dtype}"
    assert torch.equal(ids, windows.ids[rows]) and torch.equal(mask, windows.mask[rows])
    torch.testing.assert_close(probs.float()[real], p[real], atol=1e-2, rtol=1e-2)
    assert (indices[real] == i[real]).float().mean() > .99


def test_partial_cache_is_refused_and_completed(cached):
    teacher, student, cache = cached
    files = {f.name: f.read_bytes() for f in cache.folder.iterdir()}
    record = json.loads(files["manifest.json"])
    for s in record["shards"][2:]: (cache.folder / s["file"]).unlink()
    (cache.folder / "manifest.json").write_text(json.dumps(record | dict(shards=record["shards"][:2])))
    with pytest.raises(ValueError, match="partial, 14 of 24 windows"): TopKCache(cache.folder)
    assert find_cache(cache.folder, student.config, text(), 10) is None
    cache_teacher(teacher, text(), cache.folder, top_k=10, batch_size=4, shard_windows=7)
    assert {f.name: f.read_bytes() for f in cache.folder.iterdir()} == files


def test_corrupt_cache_is_refused_by_name(cached):
    _, student, cache = cached
    path = cache.folder / "shard-00001.safetensors"
    data = bytearray(path.read_bytes()); data[-3] ^= 1; path.write_bytes(data)
    with pytest.raises(ValueError, match="shard-00001.safetensors is corrupt"): TopKCache(cache.folder)
    with pytest.raises(ValueError, match="shard-00001.safetensors is corrupt"): find_cache(cache.folder, student.config, text(), 10)
    path.unlink()
    with pytest.raises(ValueError, match="shard-00001.safetensors is missing"): TopKCache(cache.folder)
    (cache.folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest.json is corrupt"): TopKCache(cache.folder)


@pytest.mark.parametrize("change,word", [(dict(top_k=11), r"another K \(10, not 11\)"), (dict(windows=text(seed=5)), "another text"), (dict(dtype="bfloat16"), "number format"),
                                         (dict(windows=text(n=23)), "another text"), (dict(teacher="other"), "another model")])
def test_cache_of_something_else_is_refused(cached, change, word):
    teacher, _, cache = cached
    if change.get("teacher"):
        change = dict(teacher=copy.deepcopy(teacher))
        change["teacher"].model.layers[3].mlp.up_proj.weight.data[0] += .1
    before = {f.name: f.read_bytes() for f in cache.folder.iterdir()}
    with pytest.raises(ValueError, match=word): cache_teacher(**dict(teacher=teacher, windows=text(), folder=cache.folder, top_k=10, shard_windows=7) | change)
    assert {f.name: f.read_bytes() for f in cache.folder.iterdir()} == before


def test_student_of_another_model_is_refused(cached):
    _, _, cache = cached
    other = make("llama"); other.lm_head.weight.data *= 1.1
    student = prune(other, [CUT], [random_patch(CUT)])
    with pytest.raises(ValueError, match="another model"): Offline(student, cache)
    with pytest.raises(ValueError, match="made from another model"): Online(student, text(), make("llama"))


def test_what_a_kill_leaves_at_the_very_beginning_is_no_obstacle(tmp_path):
    (tmp_path / ".manifest.json.partial").write_text("{")
    assert len(cache_teacher(make("llama"), text(), tmp_path, top_k=10)) == 24


def test_teacher_in_training_mode_gives_the_same_lesson(tmp_path):
    config = CONFIGS["llama"](); config.attention_dropout = .5
    teacher, out = make(config), []
    for mode in (False, True):
        teacher.train(mode)
        student = prune(teacher, [CUT], [random_patch(CUT)], share=True)
        cache = cache_teacher(teacher, text(), tmp_path / str(mode), top_k=10)
        out.append((cache[[0]][2], distill(student, text(), teacher, lr=1e-2, batch_size=8).history))
        assert teacher.training == student.training == mode
    assert torch.equal(out[0][0], out[1][0]) and out[0][1] == out[1][1]


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not a cache"): cache_teacher(make("llama"), text(), tmp_path, top_k=10)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


def test_too_small_a_disk_is_noticed_before_the_pass(tmp_path, monkeypatch):
    usage = distillation.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(distillation.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(distillation, "_shard", lambda *a: pytest.fail("the teacher ran"))
    with pytest.raises(ValueError, match="the cache needs .* GB, but only"): cache_teacher(make("llama"), text(), tmp_path / "c", top_k=10)
    check_room(tmp_path / "not" / "there", 999)
    assert not list(tmp_path.iterdir())


def test_disk_full_in_the_middle_leaves_nothing_corrupt(tmp_path, monkeypatch):
    teacher, calls, save = make("llama"), [], distillation.save_file
    def full(tensors, path, **kw):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path, **kw)
    monkeypatch.setattr(distillation, "save_file", full)
    with pytest.raises(OSError, match="cannot write .*shard-00002.*No space left.*make room"): cache_teacher(teacher, text(), tmp_path / "c", top_k=10, shard_windows=7)
    assert sorted(f.name for f in (tmp_path / "c").iterdir()) == ["manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    monkeypatch.setattr(distillation, "save_file", save)
    assert len(cache_teacher(teacher, text(), tmp_path / "c", top_k=10, shard_windows=7)) == 24


@pytest.mark.parametrize("bad,word", [(dict(top_k=1), "give 2 to 64"), (dict(top_k=65), "give 2 to 64"), (dict(dtype="int8"), "choose one of"), (dict(windows=text(n=0)), "no windows")])
def test_bad_requests_touch_nothing(tmp_path, bad, word):
    with pytest.raises(ValueError, match=word): cache_teacher(**dict(teacher=make("llama"), windows=text(), folder=tmp_path / "c", top_k=10) | bad)
    assert not (tmp_path / "c").exists()


def test_teacher_that_is_not_finite_is_refused(tmp_path):
    teacher = make("llama"); teacher.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="not finite"): cache_teacher(teacher, text(), tmp_path / "c", top_k=10)


# ---------------------------------------------------------------- objectives

@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cut", [Cut(0, 2), Cut(2, 4), Cut(4, 6)], ids=str)
def test_online_is_the_whole_student_against_the_whole_teacher(name, cut):
    teacher, student = pair(name, cut)
    windows, weight = text(4, padded=name not in ("gpt-neo",)), patch_modules(student)[0].weight
    for p in student.parameters(): p.requires_grad_(p is weight)
    kl, counted = Online(student, windows, teacher)([0, 1, 2, 3])
    gradient, = torch.autograd.grad(kl[counted].mean(), weight)
    with torch.no_grad(): target = run_model(teacher, windows.ids, windows.mask)
    naive, _ = token_kl(target, run_model(student, windows.ids, windows.mask), windows.mask)
    expected, = torch.autograd.grad(naive[counted].mean(), weight)
    torch.testing.assert_close(kl[counted], naive[counted], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-3)
    assert gradient.abs().max() > 0


def test_offline_with_everything_kept_is_online(tmp_path):
    teacher, student = pair()
    cache = cache_teacher(teacher, text(), tmp_path / "c", top_k=64, batch_size=8)
    with torch.no_grad(): a, b = Offline(student, cache)([3, 1])[0], Online(student, text(), teacher)([3, 1])[0]
    torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_training_lowers_the_distance_and_nothing_else_moves(cached, mode):
    teacher, student, cache = cached
    frozen = {k: p.clone() for k, p in student.state_dict().items() if "linear_patch" not in k}
    flags, start = {k: p.requires_grad for k, p in student.named_parameters()}, kl_divergence(teacher, student, text())
    out = distill(student, *((cache,) if mode == "offline" else (text(), teacher)), lr=1e-2, batch_size=4, epochs=4)
    assert kl_divergence(teacher, student, text()) < .7 * start and out.mode == mode and out.steps == out.total == 4 * 6
    assert out.windows == 22 and out.heldout == 2 and out.tokens == 4 * 22 * 12
    assert all(torch.equal(p, frozen[k]) for k, p in student.state_dict().items() if k in frozen)
    assert {k: p.requires_grad for k, p in student.named_parameters()} == flags and type(patch_modules(student)[0]) is torch.nn.Linear
    assert student.config.linearpatch["distilled"] == dict(mode=mode, steps=24, best=out.best)


def test_several_patches_learn_at_once():
    teacher, cuts = make("llama"), [Cut(1, 2), Cut(3, 5)]
    student = prune(teacher, cuts, [random_patch(c) for c in cuts], share=True)
    before, start = [p.weight.detach().clone() for p in patch_modules(student)], kl_divergence(teacher, student, text())
    distill(student, text(), teacher, lr=1e-2, batch_size=4, epochs=2)
    assert kl_divergence(teacher, student, text()) < start and all(not torch.equal(a, p.weight) for a, p in zip(before, patch_modules(student)))


def test_trained_student_is_saved_and_loaded(cached, tmp_path):
    _, student, cache = cached
    distill(student, cache, lr=1e-2, batch_size=4)
    save_student(student, tmp_path / "s")
    again = load_student(tmp_path / "s")
    assert torch.equal(matrix(again), matrix(student)) and again.config.linearpatch["distilled"]["mode"] == "offline"


# ---------------------------------------------------------------- what learns, and how

@pytest.mark.parametrize("learn", LEARN)
def test_every_choice_begins_at_the_start_and_stays_in_its_kind(learn):
    teacher, student = pair()
    start = matrix(student)
    with only_patches_learn(student, learn, rank=3) as learning:
        assert torch.equal(patch_modules(student)[0].weight, start)
        assert sum(p.numel() for p in learning.values()) == dict(full=32 * 32, diagonal=32, rotation=32 * 32 + 1, **{"low-rank": 2 * 32 * 3})[learn]
        assert [k for k, p in student.named_parameters() if p.requires_grad] == [f"model.layers.2.linear_patch.parametrizations.weight.0.{k[2:]}" for k in learning]
    distill(student, text(), teacher, lr=1e-2, batch_size=4, learn=learn, rank=3)
    change = (matrix(student) - start).double()
    assert change.norm() > 1e-2
    if learn == "low-rank": assert torch.linalg.matrix_rank(change, rtol=1e-4) == 3
    if learn == "diagonal":
        H = make_rotation(32).dense(torch.float64)
        turned = H.T @ change @ H
        assert (turned - turned.diag().diag()).abs().max() < 1e-5 * turned.abs().max() + 1e-6


def test_weight_decay_pulls_toward_the_start_not_toward_zero():
    moved = {}
    for decay in (0., 50.):
        teacher, student = pair()
        start = matrix(student)
        distill(student, text(), teacher, lr=1e-2, batch_size=4, epochs=4, weight_decay=decay)
        moved[decay] = (matrix(student) - start).norm().item()
    assert moved[50.] < .5 * moved[0.]


@pytest.mark.parametrize("other", [dict(batch_size=2, accumulate=4), dict(batch_size=8, gradient_checkpointing=True)], ids=str)
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
    long = Windows(torch.cat([long.ids, torch.full((12, 5), 7)], 1), torch.cat([long.mask, torch.zeros(12, 5, dtype=torch.bool)], 1), bos=False)
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
    distill(student, text(), teacher, lr=1e-2, batch_size=4, epochs=2, autocast="bfloat16", callback=watch)
    assert seen == {torch.float32} == {patch_modules(student)[0].weight.dtype} and student.lm_head.weight.dtype == torch.bfloat16
    assert kl_divergence(teacher, student, text()) < start


def test_best_patch_is_kept_and_training_stops_early():
    teacher, student = pair()
    out = distill(student, text(), teacher, lr=3., batch_size=4, epochs=10, patience=2, evals=20)
    best = min(r["heldout"] for r in out.history)
    assert out.steps < out.total and out.best == next(r["step"] for r in out.history if r["heldout"] == best)
    aside = sorted(torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()[:2])
    assert abs(kl_divergence(teacher, student, text()[aside]) - best) < 1e-4


def test_callback_sees_every_step():
    teacher, student = pair()
    seen = []
    out = distill(student, text(), teacher, lr=1e-2, batch_size=4, evals=3, callback=seen.append)
    assert [r["step"] for r in seen] == list(range(1, 7)) and all(r["loss"] > 0 and r["tokens_per_second"] > 0 for r in seen)
    assert [r["step"] for r in seen if r["heldout"] is not None] == [2, 4, 6] == [r["step"] for r in out.history[1:]]
    rates = [r["lr"] for r in seen]
    assert rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(.05 * 1e-2)


@pytest.mark.parametrize("bad,word", [(dict(lr=0), "lr is 0"), (dict(lr=float("nan")), "lr is nan"), (dict(epochs=0), "epochs is 0"), (dict(epochs=1.5), "epochs is 1.5.*whole"), (dict(clip=0), "clip is 0"), (dict(autocast="float16"), "autocast"), (dict(batch_size=-1), "batch_size is -1"),
                                      (dict(learn="some"), "choose one of"), (dict(autocast="int8"), "autocast"), (dict(heldout=24), "nothing is left"), (dict(save_every=0), "save_every"),
                                      (dict(resume=True), "needs the folder"), (dict(teacher=None), "needs the intact model")])
def test_bad_settings_change_nothing(bad, word):
    teacher, student = pair()
    before = matrix(student)
    with pytest.raises(ValueError, match=word): distill(student, text(), **dict(teacher=teacher) | bad)
    assert torch.equal(matrix(student), before) and type(patch_modules(student)[0]) is torch.nn.Linear


def test_loss_that_is_not_finite_stops_with_the_best_patch(tmp_path):
    teacher, student = pair()
    def poison(record):
        if record["step"] == 4: teacher.lm_head.weight.data[5] = float("nan")
    reference = copy.deepcopy(student)
    with pytest.raises(DistillationError, match="not finite .* at step 5, windows .*smaller lr"):
        distill(student, text(), teacher, lr=1e-2, batch_size=4, evals=6, checkpoint=tmp_path, callback=poison)
    clean = make("llama")
    with pytest.raises(ValueError, match="met a number that is not finite: delete that file"): distill(pair()[1], text(), make("llama"), lr=1e-2, batch_size=4, evals=6, checkpoint=tmp_path, resume=True)
    assert (tmp_path / "state.safetensors").is_file() and matrix(student).isfinite().all()
    assert not torch.equal(matrix(student), matrix(reference)) and len(list(tmp_path.iterdir())) == 1
    teacher.load_state_dict(clean.state_dict())
    assert kl_divergence(clean, student, text()) < kl_divergence(clean, reference, text())


# ---------------------------------------------------------------- interrupted

def test_checkpoint_of_another_run_is_refused(tmp_path):
    teacher, student = pair()
    distill(student, text(), teacher, lr=1e-2, batch_size=4, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="holds the state of another run"): distill(pair()[1], text(), teacher, lr=1e-2, batch_size=4, checkpoint=tmp_path)
    for change, word in ((dict(lr=2e-2), "its lr is 0.01, not 0.02"), (dict(seed=3), "its seed is 0, not 3")):
        with pytest.raises(ValueError, match=word): distill(pair()[1], text(), teacher, **dict(lr=1e-2, batch_size=4, checkpoint=tmp_path, resume=True) | change)
    other = prune(teacher, [Cut(1, 3)], [random_patch(Cut(1, 3))], share=True)
    with pytest.raises(ValueError, match="its cuts is"): distill(other, text(), teacher, lr=1e-2, batch_size=4, checkpoint=tmp_path, resume=True)
    result = matrix(student)  # a finished run, and a student that training has moved: the state holds the start
    distill(student, text(), teacher, lr=1e-2, batch_size=4, checkpoint=tmp_path, resume=True)
    assert torch.equal(matrix(student), result)
    path = tmp_path / "state.safetensors"; path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is corrupt"): distill(pair()[1], text(), teacher, lr=1e-2, batch_size=4, checkpoint=tmp_path, resume=True)


def work(folder, mode):
    "What is killed: cache, train, save; from the beginning each time, as a new process would."
    torch.set_num_threads(1)
    teacher, student = pair()
    common = dict(lr=1e-2, batch_size=2, epochs=5, learn="low-rank", checkpoint=folder / "state", resume=True, save_every=3)
    if mode == "online": out = distill(student, text(), teacher, **common)
    else: out = distill(student, cache_teacher(teacher, text(), folder / "cache", top_k=10, shard_windows=2), **common)
    torch.save(dict(weight=matrix(student), history=out.history, best=out.best), folder / "result.pt")


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_killed_twenty_times_it_ends_with_the_same_patch(tmp_path, mode):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(); killed.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["linearpatch.distillation", "linearpatch.pruning", "tiny"])
    for _ in range(2):  # the first one starts the server
        if (whole / "state").exists(): import shutil; shutil.rmtree(whole); whole.mkdir()
        started = time.perf_counter()
        process = context.Process(target=work, args=(whole, mode)); process.start(); process.join()
    long, chance, kills = time.perf_counter() - started, random.Random(0), 0
    while kills < 20:
        process = context.Process(target=work, args=(killed, mode)); process.start()
        process.join(chance.uniform(.3, .8) * long)
        if process.is_alive(): process.kill(); kills += 1
        process.join()
        if (killed / "result.pt").exists():  # done before its time: begin again, until there were twenty
            import shutil; shutil.rmtree(killed); killed.mkdir()
    process = context.Process(target=work, args=(killed, mode)); process.start(); process.join()
    a, b = torch.load(whole / "result.pt"), torch.load(killed / "result.pt")
    assert torch.equal(a["weight"], b["weight"]) and a["history"] == b["history"] and a["best"] == b["best"]
    if mode == "offline":
        files = [{f.name: f.read_bytes() for f in (d / "cache").iterdir() if not f.name.startswith(".")} for d in (whole, killed)]
        assert files[0] == files[1] and len(files[0]) == 13


# ---------------------------------------------------------------- trained models

@pytest.mark.parametrize("mode", ["offline", "online"])
@pytest.mark.parametrize("n", [3, 4])
def test_a_trained_model_gains_at_its_best_cuts(second_model, tmp_path, mode, n):
    teacher, tokenizer = second_model
    windows = load_windows("passages", tokenizer, seq_len=128, samples=160)
    heldout = load_windows("passages", tokenizer, split="heldout", seq_len=128, samples=None)
    stats = collect(teacher, windows, n_remove=n, rotation=make_rotation(64), batch_size=16)
    source = cache_teacher(teacher, windows, tmp_path / "c", batch_size=16) if mode == "offline" else windows
    for cut in sorted(stats.cosine, key=stats.cosine.get)[-2:]:
        student = prune(teacher, cut, fit_patch(stats, cut), share=True)
        free = perplexity(student, heldout, batch_size=16)
        distill(student, source, teacher, lr=1e-2, batch_size=4)
        assert perplexity(student, heldout, batch_size=16) < .93 * free


def test_a_trained_rotation_stays_one_and_folds():
    from linearpatch.folding import fold
    teacher = liven(make("llama")) # at its first weights the stream is so small that a norm's epsilon shows
    Q = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    student = prune(teacher, Cut(2, 4), FakePatch(1.3 * Q, Cut(2, 4), "procrustes"), share=True, dtype="float32")
    distill(student, text(), teacher, lr=1e-2, batch_size=4, learn="rotation")
    P = patch_modules(student)[0].weight.double()
    assert (P - 1.3 * Q.T).norm() > 0.01 * P.norm()
    torch.testing.assert_close(P @ P.T, (P @ P.T).diagonal().mean() * torch.eye(32).double(), atol=1e-5, rtol=0)
    folded = fold(student)
    with torch.no_grad(): torch.testing.assert_close(folded(text().ids[:2]).logits, student(text().ids[:2]).logits, atol=1e-4, rtol=1e-4)
    assert folded.folding.exact
