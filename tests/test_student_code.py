"The file that travels with a student opens one door, and keeps the others shut."

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers as tf
from students import *
from tiny import *

from linearpatch.method.models import *
from linearpatch.method.pruning import *
from linearpatch.shipped import modeling_linearpatch
from linearpatch.workshop.checkpoint import *
from linearpatch.workshop.cuts import *
from linearpatch.workshop.student_code import *

doors = """
import sys; sys.modules["linearpatch"] = None
import json, torch, transformers as tf
from pathlib import Path
tf.utils.logging.disable_progress_bar(); tf.utils.logging.set_verbosity_error()
told = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    base = getattr(tf, json.loads((folder / "config.json").read_text())["linearpatch"]["model"]["architecture"])
    refused = []
    for plain in (tf.AutoModelForCausalLM, tf.AutoModel, base):
        try: plain.from_pretrained(folder); refused.append("loads!")
        except Exception as e: refused.append("trust_remote_code=True" in str(e))
    model = tf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    try: refused.append(type(tf.AutoModelForCausalLM.from_pretrained(folder, config=tf.AutoConfig.from_pretrained(folder, trust_remote_code=True))).__name__)
    except ValueError as e: refused.append("trust_remote_code=True" in str(e))
    out = dict(refused=refused, training=model.training, name=type(model).__name__)
    if (folder / "expected").exists():
        ids, mask, logits, tokens = torch.load(folder / "expected")
        with torch.no_grad(): out["same"] = torch.equal(model(ids).logits, logits)
        new = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=2)
        out["tokens"] = torch.equal(new, tokens)
        model.save_pretrained(sys.argv[2] + "/" + folder.name) # by somebody who knows nothing
        again = tf.AutoModelForCausalLM.from_pretrained(sys.argv[2] + "/" + folder.name, trust_remote_code=True)
        with torch.no_grad(): out["again"] = torch.equal(again(ids).logits, logits)
    told[folder.name] = out
print("\\n" + json.dumps(told))
"""


def test_doors(tmp_path):
    names = [
        "llama",
        "llama-tied",
        "qwen2",
        "gemma2",
        "gemma3",
        "gemma3-vision",
        "gpt2",
        "opt",
        "falcon",
        "qwen3-moe",
    ]
    mask = (PAD != 2).long()
    for name in names:
        student = student_of(name, "many", dtype="float32")
        save_student(student, tmp_path / "in" / name, max_shard_size="20KB")
        torch.save(
            (PAD, mask, logits(student, PAD), new_tokens(student, PAD, attention_mask=mask)),
            tmp_path / "in" / name / "expected",
        )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", doors, str(tmp_path / "in"), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    for name in names:
        out = told[name]
        assert out["refused"][0] is True and out["refused"][2] is True, f"{name}: {out['refused']}"
        assert out["refused"][1] != "loads!" and out["refused"][3] in (True, out["name"])
        assert out["same"] and out["tokens"] and out["again"] and not out["training"], (
            f"{name}: {out}"
        )
        student = load_student(tmp_path / name)  # what it wrote, here
        assert torch.equal(logits(student, PAD), torch.load(tmp_path / "in" / name / "expected")[2])


def test_a_foreign_model_with_code(tmp_path, monkeypatch):
    "A base model that came with its own code: only run where that is allowed."
    code = (
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig): model_type = 'mine'\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    make("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "base/modeling_mine.py").write_text(code)
    edit(
        tmp_path / "base/config.json",
        lambda c: c.update(
            model_type="mine",
            architectures=["MineForCausalLM"],
            auto_map={
                "AutoConfig": "modeling_mine.MineConfig",
                "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
            },
        ),
    )
    teacher = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", trust_remote_code=True
    ).eval()
    student = prune(teacher, CUTS["middle"], patches_for(CUTS["middle"]))
    save_student(student, tmp_path / "s")
    assert (tmp_path / "s/modeling_mine.py").exists()
    with pytest.raises(ValueError, match="pass trust_remote_code=True"):
        load_student(tmp_path / "s")
    for again in (
        load_student(tmp_path / "s", trust_remote_code=True),
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "s", trust_remote_code=True),
    ):
        assert type(again).__name__ == "MineForCausalLM" and torch.equal(
            logits(again), logits(student)
        )
    again.save_pretrained(tmp_path / "t")
    assert torch.equal(
        logits(load_student(tmp_path / "t", trust_remote_code=True)), logits(student)
    )


def test_no_code_of_the_folder_runs(copies):
    for code in (copies / "student").glob("*.py"):
        code.write_text(f"open({str(copies / 'ran')!r}, 'w')\n" + code.read_text())
    assert load_student(copies / "student") is not None and load(copies / "student")[0] is not None
    with pytest.raises(ValueError):
        tf.AutoModelForCausalLM.from_pretrained(copies / "student", trust_remote_code=False)
    assert gone(copies) == []
    tf.AutoModelForCausalLM.from_pretrained(copies / "student", trust_remote_code=True)
    assert gone(copies) == ["ran"], "what the user allowed is run"


def test_the_file_is_copied_as_it_is(tmp_path):
    student = student_of()
    student.save_pretrained(tmp_path / "s")
    written = (tmp_path / "s" / STUDENT_CODE.name).read_bytes()
    assert written == STUDENT_CODE.read_bytes() and b"import linearpatch" not in written
    assert "from linearpatch" not in written.decode()
    remote = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "s", trust_remote_code=True)
    remote.save_pretrained(tmp_path / "t")  # from the copy in transformers' cache
    assert (tmp_path / "t" / STUDENT_CODE.name).read_bytes() == written


def test_nothing_of_the_working_folder_is_copied(tmp_path, monkeypatch):
    "A teacher without a name (made from a config) has no folder whose code could be needed."
    (tmp_path / "here").mkdir()
    (tmp_path / "here/private.py").write_text("secret = 1")
    monkeypatch.chdir(tmp_path / "here")
    student_of().save_pretrained(tmp_path / "s")
    assert [p.name for p in (tmp_path / "s").glob("*.py")] == [STUDENT_CODE.name]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3-vision", "qwen3-moe"])
def test_a_student_is_described_from_its_modules(name):
    "What the file finds out by itself is what this library knows of the model."
    from linearpatch.workshop.architectures import layers_name, text_config

    student = student_of(name, "many")
    base = modeling_linearpatch.plain_class(type(student))
    said = modeling_linearpatch.describe(student, base)
    assert said["layers"] == layers_name(student)
    assert (said["num_hidden_layers"], said["hidden_size"]) == (n_layers(student), 32)
    part, key = modeling_linearpatch.entry_of(student.config.to_dict(), said["layers_key"])
    assert part[key] == text_config(student).num_hidden_layers
    assert modeling_linearpatch.named_patches(student) and [
        m for _, m in modeling_linearpatch.named_patches(student)
    ] == patch_modules(student)
