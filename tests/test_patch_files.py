"A patch alone: for one base, undamaged, or not at all."

import hashlib
import shutil

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from students import *
from tiny import *

import linearpatch.workshop.patch_files as patch_files
from linearpatch.method.models import *
from linearpatch.method.pruning import *
from linearpatch.workshop.checkpoint import *
from linearpatch.workshop.cuts import *
from linearpatch.workshop.patch_files import *


@pytest.mark.parametrize(
    "name, where",
    [
        ("llama", "middle"),
        ("llama", "many"),
        ("gpt2", "last"),
        ("gemma3", "first"),
        ("opt", "many"),
        ("qwen3-moe", "middle"),
    ],
)
def test_patch_round_trip(name, where, tmp_path):
    teacher, cuts = teacher_of(name), CUTS[where]
    (
        teacher.save_pretrained(tmp_path / "base"),
        load_playground()[1].save_pretrained(tmp_path / "base"),
    )
    patches = patches_for(cuts)
    student = prune(teacher, cuts, patches)
    save_patch(patches, tmp_path / "fitted", base=teacher)
    save_patch(student, tmp_path / "taken")
    for p, q in zip(patches, load_patch(tmp_path / "fitted")):
        assert torch.equal(p.matrix, q.matrix) and (p.cut, p.family, p.info) == (
            q.cut,
            q.family,
            q.info,
        )
    for folder in ("fitted", "taken"):
        again, tokenizer = load(tmp_path / "base", patch=tmp_path / folder)
        assert torch.equal(logits(again), logits(student)) and torch.equal(
            new_tokens(again), new_tokens(student)
        )
        assert (
            again.config.linearpatch["cuts"] == student.config.linearpatch["cuts"]
            and tokenizer is not None
            and not again.training
        )
    assert {p.name for p in (tmp_path / "taken").iterdir()} == {
        "patch.safetensors",
        "linearpatch.json",
        "README.md",
    }


def test_patch_of_a_loaded_and_trained_student(tmp_path):
    (
        teacher_of("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base"),
        load_playground()[1].save_pretrained(tmp_path / "base"),
    )
    teacher = load_model(tmp_path / "base")[
        0
    ]  # .to() rounds the frequencies of the positions, loading does not
    student = prune(teacher, CUTS["many"], patches_for(CUTS["many"]), share=True, dtype="float32")
    with torch.no_grad():
        for m in patch_modules(student):
            m.weight += 1e-4 * torch.randn_like(m.weight)
    save_student(student, tmp_path / "s")
    save_patch(load_student(tmp_path / "s"), tmp_path / "p")
    assert {v.dtype for v in load_file(tmp_path / "p/patch.safetensors").values()} == {
        torch.float32
    }
    again, _ = load(tmp_path / "base", patch=tmp_path / "p")
    assert again.dtype == torch.bfloat16 and {m.weight.dtype for m in patch_modules(again)} == {
        torch.float32
    }
    assert torch.equal(logits(again), logits(student))


@pytest.mark.filterwarnings("ignore")
def test_patch_of_a_student_that_is_kept_elsewhere(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    student, away = student_of(where="many"), student_of(where="many")
    accelerate.cpu_offload(away, execution_device="cpu")
    assert patch_modules(away)[0].weight.device.type == "meta"
    assert all(
        torch.equal(p.matrix, q.matrix)
        for p, q in zip(student_patches(away), student_patches(student))
    )


def test_some_cuts_without_a_patch(tmp_path):
    teacher, cuts = teacher_of("llama"), CUTS["many"]
    (
        teacher.save_pretrained(tmp_path / "base"),
        load_playground()[1].save_pretrained(tmp_path / "base"),
    )
    patches = patches_for(cuts)
    patches[1].family, patches[1].matrix = "none", torch.eye(32, dtype=torch.float64)
    student = prune(teacher, cuts, patches)
    assert [p.family for p in student_patches(student)] == ["hadamard", "none", "hadamard"]
    save_patch(student, tmp_path / "p")
    again, _ = load(tmp_path / "base", patch=tmp_path / "p")
    assert len(patch_modules(again)) == 2 and torch.equal(logits(again), logits(student))


def test_second_matrix_and_what_was_folded(tmp_path):
    teacher, [patch] = teacher_of("llama"), patches_for(CUTS["middle"])
    patch.mlp = torch.randn(32, 32, dtype=torch.float64)
    save_patch(patch, tmp_path / "p", base=teacher)
    [again] = load_patch(tmp_path / "p")
    assert torch.equal(again.mlp, patch.mlp) and torch.equal(again.matrix, patch.matrix)
    student = student_of()
    student.config.linearpatch["folded"] = [dict(cut=[2, 4], family="mlp")]
    for f in (lambda: student_patches(student), lambda: save_patch(student, tmp_path / "q")):
        with pytest.raises(ValueError, match="save the patch that was given to prune"):
            f()
    patch.mlp = torch.zeros(16, 16)
    with pytest.raises(ValueError, match=r"the mlp of the patch .* \(16, 16\)"):
        save_patch(patch, tmp_path / "q", base=teacher)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda p: p.matrix.fill_(float("nan")), "NaN"),
        (lambda p: setattr(p, "matrix", torch.eye(16)), r"\(16, 16\)"),
        (lambda p: setattr(p, "cut", Cut(2, 7)), "out of range"),
    ],
)
def test_bad_patches_are_not_saved(change, said, tmp_path):
    [patch] = patches_for(CUTS["middle"])
    change(patch)
    with pytest.raises(ValueError, match=said):
        save_patch(patch, tmp_path / "p", base=teacher_of("llama"))
    assert not list(tmp_path.iterdir())


def test_patches_need_their_base(tmp_path):
    with pytest.raises(ValueError, match="base=model"):
        save_patch(patches_for(CUTS["middle"]), tmp_path / "p")
    with pytest.raises(ValueError, match="no patch to save"):
        save_patch([], tmp_path / "p", base=teacher_of("llama"))
    with pytest.raises(ValueError, match="fit one patch"):
        save_patch(patches_for([Cut(1, 2), Cut(2, 3)]), tmp_path / "p", base=teacher_of("llama"))


def test_wrong_bases_are_refused(copies):
    def base(change, **config):
        model = make(tf.LlamaConfig(**{**llama, **config}))
        with torch.no_grad():
            change(model)
        shutil.rmtree(copies / "base")
        (
            model.save_pretrained(copies / "base"),
            load_playground()[1].save_pretrained(copies / "base"),
        )

    with pytest.MonkeyPatch.context() as m:
        m.setattr(patch_files, "load_model", lambda *a: pytest.fail("the weights were read"))
        for config, said in (
            (dict(num_hidden_layers=5), "6 layers.* has 5"),
            (dict(hidden_size=64), "32 channels.* has 64"),
        ):
            base(lambda m: None, **config)
            with pytest.raises(ValueError, match=said):
                load(copies / "base", patch=copies / "patch")
    base(lambda m: m.model.layers[0].mlp.down_proj.weight.mul_(1.01))
    with pytest.raises(ValueError, match="other weights.*fingerprint"):
        load(copies / "base", patch=copies / "patch")
    base(lambda m: None)  # and this is the one
    assert n_layers(load(copies / "base", patch=copies / "patch")[0]) == 2
    with pytest.raises(ValueError, match="patched student"):
        load(copies / "student", patch=copies / "patch")


def test_spoiled_patch_files(copies):
    path, file = copies / "patch", copies / "patch/patch.safetensors"
    whole = file.read_bytes()

    def signed(data):
        file.write_bytes(data)
        edit(
            path / "linearpatch.json",
            lambda r: r["weights"].update(sha256=hashlib.sha256(data).hexdigest()),
        )

    for data in (whole[:-1], whole[:8], b"", whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]):
        file.write_bytes(data)
        with pytest.raises(ValueError, match="SHA-256"):
            load_patch(path)
    for data, said in (
        (whole[:-1], "no safetensors file"),
        (b"", "no safetensors file"),
        (b"PK\x03\x04" + whole, "no safetensors file"),
    ):
        signed(data)  # whoever alters a file can write its new hash down, too
        with pytest.raises(ValueError, match=said):
            load_patch(path)
    for change, said in (
        (lambda t: t["0.matrix"].fill_(float("inf")), "NaN or infinity"),
        (lambda t: t.update({"0.matrix": torch.eye(8)}), r"\(8, 8\)"),
        (lambda t: t.pop("1.matrix"), "lacks the matrix"),
        (lambda t: t.update(x=torch.eye(2)), "no patch asks for"),
    ):
        signed(whole)
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        signed(file.read_bytes())
        with pytest.raises(ValueError, match=said):
            load_patch(path)
    signed(whole)
    assert len(load_patch(path)) == 3
