"What is loaded computes what was saved, or loading fails and says what to do."

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from students import *
from tiny import *

import linearpatch.workshop.checkpoint as checkpoint
import linearpatch.workshop.patch_files as patch_files
import linearpatch.workshop.records as records
from linearpatch.method.models import *
from linearpatch.method.pruning import *
from linearpatch.workshop.checkpoint import *
from linearpatch.workshop.cuts import *
from linearpatch.workshop.patch_files import *


@pytest.mark.parametrize("name", [*CONFIGS, *MORE])
def test_round_trip(name, tmp_path):
    student = student_of(name, "many")
    code = dict(trust_remote_code=hasattr(student.config, "auto_map"))
    expected, before = logits(student), plain(student.config)
    save_student(student, tmp_path / "s", max_shard_size="20KB")
    assert (
        len(list((tmp_path / "s").glob("model-*.safetensors"))) > 2
        and (tmp_path / "s/model.safetensors.index.json").exists()
    )
    again = load_student(tmp_path / "s", **code)
    assert (
        type(again).__name__ == type(student).__name__
        and type(again.config).__name__ == type(student.config).__name__
        and not again.training
    )
    assert torch.equal(logits(again), expected) and torch.equal(
        new_tokens(again), new_tokens(student)
    )
    a, b = student.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert again.config.linearpatch == student.config.linearpatch and again.config.linearpatch[
        "cuts"
    ] == [[0, 1], [2, 3], [4, 6]]
    assert plain(again.config) == before, "the config is the one that was saved"
    assert {p.suffix for p in (tmp_path / "s").iterdir()} == {".json", ".safetensors", ".md", ".py"}
    save_student(again, tmp_path / "t")  # and once more
    assert torch.equal(logits(load_student(tmp_path / "t", **code)), expected)
    again.save_pretrained(tmp_path / "u")  # as a training loop does
    assert torch.equal(logits(load_student(tmp_path / "u", **code)), expected)


@pytest.mark.parametrize("where", CUTS)
def test_every_place_and_padding(where, tmp_path):
    student = student_of(where=where)
    save_student(student, tmp_path / "s")
    mask = (PAD != 2).long()
    for again in (
        load_student(tmp_path / "s"),
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "s", trust_remote_code=True),
    ):
        assert torch.equal(logits(again), logits(student))
        assert torch.equal(
            new_tokens(again, PAD, attention_mask=mask),
            new_tokens(student, PAD, attention_mask=mask),
        )


@pytest.mark.parametrize(
    "dtype, patch_dtype",
    [("bfloat16", None), ("bfloat16", "float32"), ("float32", None), ("float32", "bfloat16")],
)
def test_dtypes(dtype, patch_dtype, tmp_path):
    teacher = tf.AutoModelForCausalLM.from_config(
        CONFIGS["llama"](), dtype=getattr(torch, dtype)
    ).eval()
    student = prune(teacher, CUTS["many"], patches_for(CUTS["many"]), dtype=patch_dtype)
    save_student(student, tmp_path / "s")
    remote = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "s", trust_remote_code=True, dtype="auto"
    )
    for again in (load_student(tmp_path / "s"), remote):
        assert {str(m.weight.dtype) for m in patch_modules(again)} == {
            f"torch.{patch_dtype or dtype}"
        }
        assert str(again.dtype) == f"torch.{dtype}" and torch.equal(logits(again), logits(student))
    low = load_student(tmp_path / "s", dtype="bfloat16")
    assert low.dtype == torch.bfloat16 and logits(low).isfinite().all()


@pytest.mark.parametrize("where", ["auto", {"": "cpu"}])
def test_device_map(where, saved):
    expected = logits(load_student(saved / "student"))
    assert torch.equal(logits(load_student(saved / "student", device_map=where)), expected)
    assert torch.equal(
        logits(
            tf.AutoModelForCausalLM.from_pretrained(
                saved / "student", trust_remote_code=True, device_map=where
            )
        ),
        expected,
    )


def test_generation_config_and_tokenizer_travel(tmp_path):
    student, tokenizer = student_of(), load_playground()[1]
    student.generation_config.max_new_tokens = 3
    save_student(student, tmp_path / "s", tokenizer)
    again, its_tokenizer = load(tmp_path / "s")
    assert again.generation_config.max_new_tokens == 3 and type(its_tokenizer) is type(tokenizer)
    assert its_tokenizer("The old man").input_ids == tokenizer("The old man").input_ids
    save_student(student, tmp_path / "t")
    assert load(tmp_path / "t")[1] is None


def test_no_patch_no_seal(tmp_path):
    "Without patch modules (nothing fitted, or folded) the folder is a plain one."
    student = prune(teacher_of("llama"), CUTS["middle"])
    student.config.linearpatch["folded"] = [dict(cut=[2, 4], family="hadamard")]
    save_student(student, tmp_path / "s", load_playground()[1])
    assert (
        not list((tmp_path / "s").glob("*.py"))
        and json.loads((tmp_path / "s/config.json").read_text())["model_type"] == "llama"
    )
    card = (tmp_path / "s/README.md").read_text()
    assert "trust_remote_code" not in card and "hadamard, folded into the weights" in card
    for again in (
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "s"),
        load_student(tmp_path / "s"),
        load(tmp_path / "s")[0],
        load_model(tmp_path / "s")[0],
    ):
        assert torch.equal(logits(again), logits(student)) and type(again) is tf.LlamaForCausalLM
    with pytest.raises(ValueError, match="save the patch that was given to prune"):
        save_patch(student, tmp_path / "p")


def test_save_errors(tmp_path):
    student = student_of()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        save_student(student, tmp_path / "full")
    assert (tmp_path / "full/x").read_text() == "mine"
    with torch.no_grad():
        patch_modules(student)[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        save_student(student, tmp_path / "nan")
    assert not (tmp_path / "nan").exists()
    student = student_of()
    del student.config.linearpatch
    with pytest.raises(ValueError, match="records 0"):
        save_student(student, tmp_path / "lost")
    with pytest.raises(ValueError, match="no student.*save_pretrained"):
        save_student(make("llama"), tmp_path / "teacher")


def test_lm_eval(tmp_path):
    "The evaluation harness takes the folder as it is; its command line makes the same object."
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    teacher, tokenizer = load_playground()
    cut = Cut(2, 4)
    student = prune(teacher, cut, patches_for([cut], 64))
    save_student(student, tmp_path / "s", tokenizer)
    texts = [("The old man", " went down to the river"), ("It was", " cold")]

    def scores(model):
        model = model if isinstance(model, str) else dict(pretrained=model, tokenizer=tokenizer)
        lm = huggingface.HFLM(
            **(dict(pretrained=model, trust_remote_code=True) if isinstance(model, str) else model),
            batch_size=1,
            device="cpu",
            dtype="float32",
        )
        return [
            x
            for x, _ in lm.loglikelihood(
                [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(texts)],
                disable_tqdm=True,
            )
        ]

    assert scores(str(tmp_path / "s")) == pytest.approx(scores(student), abs=1e-4)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        huggingface.HFLM(pretrained=str(tmp_path / "s"), device="cpu")


def test_load_model_refuses_students(saved):
    for trust in (False, True):
        with pytest.raises(ValueError, match="patched student.*linearpatch.load"):
            load_model(saved / "student", trust_remote_code=trust)


def test_config_that_claims_more_layers(copies):
    "A plain model, too: transformers would fill the rest with random numbers."
    edit(copies / "base/config.json", lambda c: c.update(num_hidden_layers=8))
    for call in (load, load_model):
        with pytest.raises(ValueError, match="lack.*layers.6"):
            call(copies / "base")
    student = prune(teacher_of("llama"), CUTS["middle"])
    save_student(student, copies / "plain", load_playground()[1])
    edit(copies / "plain/config.json", lambda c: c.update(num_hidden_layers=5))
    for call in (load, load_student):
        with pytest.raises(ValueError, match="do not fit.*layers.4"):
            call(copies / "plain")


def test_spoiled_student_files(copies):
    folder, file = copies / "student", copies / "student/model.safetensors"
    whole = file.read_bytes()
    for data in (whole[:-1], b"", whole[:8]):
        file.write_bytes(data)
        with pytest.raises(ValueError, match="damaged"):
            load_student(folder)
    (copies / "base/model.safetensors").write_bytes(
        (copies / "base/model.safetensors").read_bytes()[:-1]
    )
    with pytest.raises(ValueError, match="damaged"):
        load(copies / "base")
    file.write_bytes(whole)
    tensors = load_file(file)
    tensors["model.layers.0.linear_patch.weight"][3, 4] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="NaN"):
        load_student(folder)
    file.unlink()
    with pytest.raises(ValueError, match="no model.safetensors"):
        load_student(folder)


def test_nothing_is_unpickled(copies):
    for folder, call in ((copies / "student", load_student), (copies / "student", load)):
        (folder / "model.safetensors").unlink(missing_ok=True)
        for name in ("pytorch_model.bin", "model.bin", "training_args.bin", "tf_model.h5"):
            torch.save(Bomb(folder / "ran"), folder / name)
        with pytest.raises(ValueError, match="opening a pickle can run code"):
            call(folder)
        with pytest.raises((OSError, ValueError)):
            tf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    torch.save(Bomb(copies / "ran"), copies / "patch/patch.safetensors")
    with pytest.raises(ValueError):
        load_patch(copies / "patch")
    assert gone(copies) == []


def test_where_there_is_nothing(copies, tmp_path):
    for call in (load, load_student, load_patch):
        with pytest.raises(ValueError, match="there is no folder"):
            call("./nowhere")
        with pytest.raises(ValueError, match="Hub"):
            call("nobody/nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="no config.json"):
        load_student(tmp_path / "empty")
    with pytest.raises(ValueError, match="no linearpatch.json"):
        load_patch(tmp_path / "empty")
    with pytest.raises(ValueError, match="is a file"):
        load_student(tmp_path / "file")
    with pytest.raises(ValueError, match="no linearpatch.json"):
        load_patch(tmp_path / "file")
    with pytest.raises(ValueError, match="no student.*load_model"):
        load_student(copies / "base")
    with pytest.raises(ValueError, match="load\\(base, patch="):
        load(copies / "patch")
    with pytest.raises(ValueError, match="no linearpatch.json"):
        load(copies / "base", patch=copies / "student")


@pytest.mark.parametrize("alone", [False, True])
def test_push_to_hub(alone, monkeypatch, tmp_path):
    calls = []

    class Hub:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **kw):
            calls.append(("create", repo_id, kw))
            self.repo_id = "me/" + repo_id
            return self

        def upload_folder(self, repo_id, folder_path, **kw):
            calls.append(("upload", repo_id, kw))
            shutil.copytree(folder_path, tmp_path / "up")
            self.commit_url = "there"
            return self

    monkeypatch.setattr(checkpoint, "HfApi", Hub)
    student = student_of(where="many")
    with torch.no_grad():
        weight = patch_modules(student)[0].weight
        old = weight[0, 0].item()
        weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        push_to_hub(student, "it", alone=alone)
    assert calls == [], "nothing was sent"
    with torch.no_grad():
        weight[0, 0] = old
    assert (
        push_to_hub(
            student,
            "it",
            load_playground()[1],
            alone=alone,
            private=True,
            token="t",
            commit_message="Mine",
        )
        == "there"
    )
    assert (
        [c[0] for c in calls] == ["token", "create", "upload"]
        and calls[0][1] == "t"
        and calls[1][2] == dict(private=True, exist_ok=True)
    )
    assert calls[2][1] == "me/it" and calls[2][2]["commit_message"] == "Mine"
    if alone:
        assert [
            torch.equal(p.matrix, q.matrix)
            for p, q in zip(load_patch(tmp_path / "up"), student_patches(student))
        ] == [True] * 3
    else:
        assert (
            torch.equal(logits(load_student(tmp_path / "up")), logits(student))
            and "model.safetensors.index.json" in calls[2][2]["delete_patterns"]
        )


def test_from_the_hub(saved, monkeypatch):
    "What has a name on the Hub is fetched, but for files that are not read, and loaded from there."
    asked = []

    def fetch(name, ignore_patterns):
        asked.append(name)
        assert "*.bin" in ignore_patterns
        return str(saved / name.split("/")[1])

    monkeypatch.setattr(records, "snapshot_download", fetch)
    monkeypatch.setattr(
        checkpoint.PretrainedConfig,
        "get_config_dict",
        classmethod(
            lambda cls, name, **kw: (
                json.loads((saved / name.split("/")[-1] / "config.json").read_text()),
                kw,
            )
        ),
    )
    assert (
        torch.equal(logits(load_student("me/student")), logits(student_of(where="many")))
        and len(load_patch("me/patch")) == 3
    )
    assert load("me/student")[1] is not None and asked == ["me/student", "me/patch", "me/student"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes that share their memory")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["student", "patch"])
def test_a_kill_leaves_the_old_or_the_new(kind, tmp_path):
    "SIGKILL at every step of a save: before each call that touches the disk, by its number."
    student, load_it = student_of(where="many"), load_student if kind == "student" else load_patch
    save = save_student if kind == "student" else save_patch

    def attempt(n, folder):
        "Save in a child that kills itself before its n-th write, sync or rename; did it live?"
        pid = os.fork()
        if pid:
            return os.waitpid(pid, 0)[1] == 0
        left = [n]

        def step(f):
            def wrapped(*a, **k):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return f(*a, **k)

            return wrapped

        os.replace, os.fsync, Path.write_text, patch_files.save_file = (
            step(os.replace),
            step(os.fsync),
            step(Path.write_text),
            step(patch_files.save_file),
        )
        type(student).save_pretrained, Path.chmod = (
            step(type(student).save_pretrained),
            step(Path.chmod),
        )
        try:
            save(student, folder)
        except BaseException:
            os._exit(1)
        os._exit(0)

    killed, n = 0, 0
    while True:
        folder = tmp_path / f"{n}"
        if n % 2:
            folder.mkdir()  # the old one: an empty folder
        lived = attempt(n, folder)
        there = folder.exists() and any(folder.iterdir())
        if there:
            load_it(folder)
        assert there or not lived
        assert folder.exists() or not n % 2, "the old folder is gone, and the new one is not there"
        if lived:
            break
        killed, n = killed + 1, n + 1
    assert killed > 6, "the kills came too late"
    assert all(p.name.endswith(".partial") for p in tmp_path.iterdir() if not p.name.isdigit())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes that share their memory")
@pytest.mark.filterwarnings("ignore")
def test_a_kill_at_any_moment(tmp_path):
    "The same by the clock: the kill comes wherever the save happens to be."
    import random
    import threading

    student = student_of(where="many")
    seen, random_ = set(), random.Random(0)
    for n in range(12):
        folder = tmp_path / f"{n}"
        pid = os.fork()
        if not pid:
            try:
                save_student(student, folder)
                os._exit(0)
            except BaseException:
                os._exit(1)
        timer = threading.Timer(random_.random() * 0.08, lambda: os.kill(pid, signal.SIGKILL))
        timer.start()
        status = os.waitpid(pid, 0)[1]
        timer.cancel()
        timer.join()
        if folder.exists():
            assert torch.equal(logits(load_student(folder)), logits(student))
            seen.add("new")
        else:
            assert status == signal.SIGKILL
            seen.add("old")
    assert seen


# -- in a training loop


@pytest.mark.parametrize("where_from", ["pruned", "loaded", "from AutoModel"])
def test_trainer_saves_a_student(where_from, tmp_path):
    "transformers' Trainer calls `save_pretrained` at a checkpoint: it holds the student as it is."
    student = student_of(where="many")
    save_student(student, tmp_path / "s")
    if where_from == "loaded":
        student = load_student(tmp_path / "s")
    if where_from == "from AutoModel":
        student = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "s", trust_remote_code=True)
    before = [m.weight.detach().clone() for m in patch_modules(student)]
    arguments = tf.TrainingArguments(
        str(tmp_path / "out"),
        max_steps=2,
        save_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS.repeat(4, 1)]
    trainer = tf.Trainer(student, arguments, train_dataset=rows)
    trainer.train()
    after = [m.weight.detach() for m in patch_modules(student)]
    assert not any(torch.equal(a, b) for a, b in zip(before, after)), "the patches were trained"

    expected = logits(student.eval())
    folder = tmp_path / "out/checkpoint-2"
    for again in (
        load_student(folder),
        tf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval(),
    ):
        assert torch.equal(logits(again), expected)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        tf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    first = load_student(tmp_path / "out/checkpoint-1")  # and the training goes on from there
    tf.Trainer(first, arguments, train_dataset=rows).train(
        resume_from_checkpoint=str(tmp_path / "out/checkpoint-1")
    )
    assert torch.allclose(logits(first.eval()), expected, atol=1e-5)


def test_another_process_of_a_training_writes_nothing(tmp_path):
    student_of().save_pretrained(tmp_path / "s", is_main_process=False)
    assert not list((tmp_path / "s").iterdir())


def test_a_patch_in_training_as_a_product_is_not_saved(tmp_path):
    from torch.nn.utils import parametrize

    student = student_of()
    parametrize.register_parametrization(patch_modules(student)[0], "weight", torch.nn.Identity())
    with pytest.raises(ValueError, match="when its training has ended"):
        student.save_pretrained(tmp_path / "s")
    assert not (tmp_path / "s").exists()
