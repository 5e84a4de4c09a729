"The teacher's cache: what it gives back, what it refuses, and what an interruption leaves."

import copy
import json

import pytest
import torch
from distilling import CUT, make_cached, text
from tiny import CONFIGS, fresh as make, random_patch

from linearpatch.method.distillation import Offline, Online, distill, top_k_probs
from linearpatch.method.pruning import prune
from linearpatch.workshop import teacher_cache
from linearpatch.workshop.forward import run_model
from linearpatch.workshop.teacher_cache import (
    TopKCache,
    bytes_per_token,
    cache_teacher,
    check_room,
    find_cache,
    index_dtype,
)


@pytest.fixture
def cached(tmp_path):
    return make_cached(tmp_path)


@pytest.mark.parametrize(
    "vocab,dtype,size",
    [
        (200, torch.uint8, 3),
        (256, torch.uint8, 3),
        (257, torch.uint16, 4),
        (65_536, torch.uint16, 4),
        (65_537, torch.int32, 6),
    ],
)
def test_smallest_index_that_holds_the_vocabulary(vocab, dtype, size):
    assert index_dtype(vocab) == dtype and bytes_per_token(vocab, 100) == 100 * size
    assert torch.tensor([vocab - 1]).to(dtype).long().item() == vocab - 1


@pytest.mark.parametrize("dtype", teacher_cache.CACHE_DTYPES)
def test_cache_gives_back_what_the_teacher_said_in_any_order(tmp_path, dtype):
    teacher, windows, rows = make("llama"), text(padded=True), [23, 0, 8, 7, 14]
    cache = cache_teacher(
        teacher, windows, tmp_path / "c", top_k=10, dtype=dtype, batch_size=4, shard_windows=7
    )
    ids, mask, probs, indices = cache[rows]
    with torch.no_grad():
        p, i = top_k_probs(run_model(teacher, windows.ids[rows], windows.mask[rows])[:, :-1], 10)
    real = windows.mask[rows][:, 1:]
    assert (
        len(cache) == 24
        and len(cache.manifest.shards) == 4
        and str(probs.dtype) == f"torch.{dtype}"
    )
    assert torch.equal(ids, windows.ids[rows]) and torch.equal(mask, windows.mask[rows])
    torch.testing.assert_close(probs.float()[real], p[real], atol=1e-2, rtol=1e-2)
    assert (indices[real] == i[real]).float().mean() > 0.99


def test_partial_cache_is_refused_and_completed(cached):
    teacher, student, cache = cached
    files = {f.name: f.read_bytes() for f in cache.folder.iterdir()}
    record = json.loads(files["manifest.json"])
    for s in record["shards"][2:]:
        (cache.folder / s["file"]).unlink()
    (cache.folder / "manifest.json").write_text(
        json.dumps(record | dict(shards=record["shards"][:2]))
    )
    with pytest.raises(ValueError, match="partial, 14 of 24 windows"):
        TopKCache(cache.folder)
    assert find_cache(cache.folder, student.config, text(), 10) is None
    cache_teacher(teacher, text(), cache.folder, top_k=10, batch_size=4, shard_windows=7)
    assert {f.name: f.read_bytes() for f in cache.folder.iterdir()} == files


def test_corrupt_cache_is_refused_by_name(cached):
    _, student, cache = cached
    path = cache.folder / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="shard-00001.safetensors is corrupt"):
        TopKCache(cache.folder)
    with pytest.raises(ValueError, match="shard-00001.safetensors is corrupt"):
        find_cache(cache.folder, student.config, text(), 10)
    path.unlink()
    with pytest.raises(ValueError, match="shard-00001.safetensors is missing"):
        TopKCache(cache.folder)
    (cache.folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest.json is corrupt"):
        TopKCache(cache.folder)


@pytest.mark.parametrize(
    "change,word",
    [
        (dict(top_k=11), r"another K \(10, not 11\)"),
        (dict(windows=text(seed=5)), "another text"),
        (dict(dtype="bfloat16"), "number format"),
        (dict(windows=text(n=23)), "another text"),
        (dict(teacher="other"), "another model"),
    ],
)
def test_cache_of_something_else_is_refused(cached, change, word):
    teacher, _, cache = cached
    if change.get("teacher"):
        change = dict(teacher=copy.deepcopy(teacher))
        change["teacher"].model.layers[3].mlp.up_proj.weight.data[0] += 0.1
    before = {f.name: f.read_bytes() for f in cache.folder.iterdir()}
    with pytest.raises(ValueError, match=word):
        cache_teacher(
            **dict(teacher=teacher, windows=text(), folder=cache.folder, top_k=10, shard_windows=7)
            | change
        )
    assert {f.name: f.read_bytes() for f in cache.folder.iterdir()} == before


def test_student_of_another_model_is_refused(cached):
    _, _, cache = cached
    other = make("llama")
    other.lm_head.weight.data *= 1.1
    student = prune(other, [CUT], [random_patch(CUT)])
    with pytest.raises(ValueError, match="another model"):
        Offline(student, cache)
    with pytest.raises(ValueError, match="made from another model"):
        Online(student, text(), make("llama"))


def test_what_a_kill_leaves_at_the_very_beginning_is_no_obstacle(tmp_path):
    (tmp_path / ".manifest.json.partial").write_text("{")
    assert len(cache_teacher(make("llama"), text(), tmp_path, top_k=10)) == 24


def test_teacher_in_training_mode_gives_the_same_lesson(tmp_path):
    config = CONFIGS["llama"]()
    config.attention_dropout = 0.5
    teacher, out = make(config), []
    for mode in (False, True):
        teacher.train(mode)
        student = prune(teacher, [CUT], [random_patch(CUT)], share=True)
        cache = cache_teacher(teacher, text(), tmp_path / str(mode), top_k=10)
        out.append(
            (cache[[0]][2], distill(student, text(), teacher, lr=1e-2, batch_size=8).history)
        )
        assert teacher.training == student.training == mode
    assert torch.equal(out[0][0], out[1][0]) and out[0][1] == out[1][1]


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not a cache"):
        cache_teacher(make("llama"), text(), tmp_path, top_k=10)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


def test_too_small_a_disk_is_noticed_before_the_pass(tmp_path, monkeypatch):
    usage = teacher_cache.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(teacher_cache, "_shard", lambda *a: pytest.fail("the teacher ran"))
    with pytest.raises(ValueError, match="the cache needs .* GB, but only"):
        cache_teacher(make("llama"), text(), tmp_path / "c", top_k=10)
    check_room(tmp_path / "not" / "there", 999)
    assert not list(tmp_path.iterdir())


def test_disk_full_in_the_middle_leaves_nothing_corrupt(tmp_path, monkeypatch):
    teacher, calls, save = make("llama"), [], teacher_cache.save_file

    def full(tensors, path, **kw):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path, **kw)

    monkeypatch.setattr(teacher_cache, "save_file", full)
    with pytest.raises(OSError, match="cannot write .*shard-00002.*No space left.*make room"):
        cache_teacher(teacher, text(), tmp_path / "c", top_k=10, shard_windows=7)
    assert sorted(f.name for f in (tmp_path / "c").iterdir()) == [
        "manifest.json",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]
    monkeypatch.setattr(teacher_cache, "save_file", save)
    assert len(cache_teacher(teacher, text(), tmp_path / "c", top_k=10, shard_windows=7)) == 24


@pytest.mark.parametrize(
    "bad,word",
    [
        (dict(top_k=1), "give 2 to 64"),
        (dict(top_k=65), "give 2 to 64"),
        (dict(dtype="int8"), "choose one of"),
        (dict(windows=text(n=0)), "no windows"),
    ],
)
def test_bad_requests_touch_nothing(tmp_path, bad, word):
    with pytest.raises(ValueError, match=word):
        cache_teacher(
            **dict(teacher=make("llama"), windows=text(), folder=tmp_path / "c", top_k=10) | bad
        )
    assert not (tmp_path / "c").exists()


def test_teacher_that_is_not_finite_is_refused(tmp_path):
    teacher = make("llama")
    teacher.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        cache_teacher(teacher, text(), tmp_path / "c", top_k=10)


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(top_k="many"), "top_k"),
        (dict(shards=[dict(file="../x.safetensors", count=1, sha256="")]), "shards.0.file"),
        (dict(format="linearpatch top-K cache 2"), "format"),
        (dict(extra=1), "extra"),
        (dict(windows=None), "windows"),
    ],
)
def test_malformed_manifest_says_what_is_wrong(cached, change, word):
    _, _, cache = cached
    record = cache.manifest.model_dump() | change
    (cache.folder / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"manifest.json is corrupt.*\({word}: .*delete"):
        TopKCache(cache.folder)
