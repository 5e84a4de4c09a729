"Chapter 09: what is loaded computes what was saved, or loading fails and says what to do."
import hashlib, json, os, shutil, signal, subprocess, sys
import pytest, torch, transformers as tf
from pathlib import Path
from safetensors.torch import load_file, save_file
import linearpatch.checkpoint as checkpoint
from linearpatch.checkpoint import *
from linearpatch.fusion import Patch
from linearpatch.models import *
from linearpatch.pruning import *
from tiny import CONFIGS, IDS, gpt, headed, llama, make, new_tokens, random_patch

CUTS = {"middle": [Cut(2, 4)], "first": [Cut(0, 2)], "last": [Cut(4, 6)], "many": [Cut(0, 1), Cut(2, 3), Cut(4, 6)]}
MORE = {
    "llama-tied": lambda: tf.LlamaConfig(**llama, tie_word_embeddings=True),
    "gemma3-vision": lambda: tf.Gemma3Config(text_config=dict(headed, sliding_window=4, model_type="gemma3_text"), mm_tokens_per_image=4,
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14)),
}
PAD = torch.tensor([[2, 2, 2, 0, 5, 9, 33, 12], IDS[0].tolist()])


@pytest.fixture(autouse=True)
def quiet():
    tf.utils.logging.disable_progress_bar(); tf.utils.logging.set_verbosity_error()
    yield
    tf.utils.logging.enable_progress_bar(); tf.utils.logging.set_verbosity_warning()


def patches_for(cuts, hidden=32):
    fakes = [random_patch(c, hidden, seed=i) for i, c in enumerate(cuts)]
    return [Patch(p.matrix, p.family, p.cut, dict(tokens=7)) for p in fakes]
def teacher_of(name):
    if name == "gemma3-vision":
        torch.manual_seed(0)
        return tf.AutoModelForImageTextToText.from_config(MORE[name]()).eval()
    return make(MORE[name]() if name in MORE else name)
def student_of(name="llama", where="middle", **kw): return prune(teacher_of(name), CUTS[where], patches_for(CUTS[where]), **kw)
def logits(model, ids=IDS, **kw):
    with torch.no_grad(): return model(ids, **kw).logits
def plain(config):
    "A config without what differs between a model in memory and one from a file."
    def without(x): return {k: without(v) for k, v in x.items() if k not in ("architectures", "dtype", "linearpatch", "_name_or_path")} if isinstance(x, dict) else x
    return without(json.loads(json.dumps(config.to_dict(), default=str)))
def listing(folder): return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A student and a patch on disk, to be copied and spoiled."
    folder = tmp_path_factory.mktemp("saved")
    student = student_of(where="many")
    save_student(student, folder / "student", load_playground()[1])
    save_patch(student, folder / "patch")
    teacher_of("llama").save_pretrained(folder / "base"), load_playground()[1].save_pretrained(folder / "base")
    return folder


@pytest.fixture
def copies(saved, tmp_path):
    for p in saved.iterdir(): shutil.copytree(p, tmp_path / p.name)
    return tmp_path


def edit(path, change):
    "Change a JSON file in place; `change` alters the object, or returns another one."
    values = json.loads(path.read_text())
    path.write_text(json.dumps(change(values) or values))


# -- a student and its folder

@pytest.mark.parametrize("name", [*CONFIGS, *MORE])
def test_round_trip(name, tmp_path):
    student = student_of(name, "many")
    expected, before = logits(student), plain(student.config)
    save_student(student, tmp_path / "s", max_shard_size="20KB")
    assert len(list((tmp_path / "s").glob("model-*.safetensors"))) > 2 and (tmp_path / "s/model.safetensors.index.json").exists()
    again = load_student(tmp_path / "s")
    assert type(again) is type(student) and type(again.config) is type(student.config) and not again.training
    assert torch.equal(logits(again), expected) and torch.equal(new_tokens(again), new_tokens(student))
    a, b = student.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert again.config.linearpatch == student.config.linearpatch and again.config.linearpatch["cuts"] == [[0, 1], [2, 3], [4, 6]]
    assert plain(again.config) == before, "the config is the one that was saved"
    assert {p.suffix for p in (tmp_path / "s").iterdir()} == {".json", ".safetensors", ".md", ".py"}
    save_student(again, tmp_path / "t") # and once more
    assert torch.equal(logits(load_student(tmp_path / "t")), expected)
    with pytest.raises(ValueError, match="linearpatch.save_student"): again.save_pretrained(tmp_path / "u")


@pytest.mark.parametrize("where", CUTS)
def test_every_place_and_padding(where, tmp_path):
    student = student_of(where=where)
    save_student(student, tmp_path / "s")
    mask = (PAD != 2).long()
    for again in (load_student(tmp_path / "s"), tf.AutoModelForCausalLM.from_pretrained(tmp_path / "s", trust_remote_code=True)):
        assert torch.equal(logits(again), logits(student))
        assert torch.equal(new_tokens(again, PAD, attention_mask=mask), new_tokens(student, PAD, attention_mask=mask))


@pytest.mark.parametrize("dtype, patch_dtype", [("bfloat16", None), ("bfloat16", "float32"), ("float32", None), ("float32", "bfloat16")])
def test_dtypes(dtype, patch_dtype, tmp_path):
    teacher = tf.AutoModelForCausalLM.from_config(CONFIGS["llama"](), dtype=getattr(torch, dtype)).eval()
    student = prune(teacher, CUTS["many"], patches_for(CUTS["many"]), dtype=patch_dtype)
    save_student(student, tmp_path / "s")
    remote = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "s", trust_remote_code=True, dtype="auto")
    for again in (load_student(tmp_path / "s"), remote):
        assert {str(m.weight.dtype) for m in patch_modules(again)} == {f"torch.{patch_dtype or dtype}"}
        assert str(again.dtype) == f"torch.{dtype}" and torch.equal(logits(again), logits(student))
    low = load_student(tmp_path / "s", dtype="bfloat16")
    assert low.dtype == torch.bfloat16 and logits(low).isfinite().all()


@pytest.mark.parametrize("where", ["auto", {"": "cpu"}])
def test_device_map(where, saved):
    expected = logits(load_student(saved / "student"))
    assert torch.equal(logits(load_student(saved / "student", device_map=where)), expected)
    assert torch.equal(logits(tf.AutoModelForCausalLM.from_pretrained(saved / "student", trust_remote_code=True, device_map=where)), expected)


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
    assert not list((tmp_path / "s").glob("*.py")) and json.loads((tmp_path / "s/config.json").read_text())["model_type"] == "llama"
    card = (tmp_path / "s/README.md").read_text()
    assert "trust_remote_code" not in card and "hadamard, folded into the weights" in card
    for again in (tf.AutoModelForCausalLM.from_pretrained(tmp_path / "s"), load_student(tmp_path / "s"), load(tmp_path / "s")[0], load_model(tmp_path / "s")[0]):
        assert torch.equal(logits(again), logits(student)) and type(again) is tf.LlamaForCausalLM
    with pytest.raises(ValueError, match="save the patch that was given to prune"): save_patch(student, tmp_path / "p")


def test_a_foreign_model_with_code(tmp_path, monkeypatch):
    "A base model that came with its own code: only run where that is allowed."
    code = ("from transformers import LlamaConfig, LlamaForCausalLM\n"
            "class MineConfig(LlamaConfig): model_type = 'mine'\n"
            "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n")
    make("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "base/modeling_mine.py").write_text(code)
    edit(tmp_path / "base/config.json", lambda c: c.update(model_type="mine", architectures=["MineForCausalLM"],
        auto_map={"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}))
    teacher = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=True).eval()
    student = prune(teacher, CUTS["middle"], patches_for(CUTS["middle"]))
    save_student(student, tmp_path / "s")
    assert (tmp_path / "s/modeling_mine.py").exists()
    with pytest.raises(ValueError, match="pass trust_remote_code=True"): load_student(tmp_path / "s")
    for again in (load_student(tmp_path / "s", trust_remote_code=True), tf.AutoModelForCausalLM.from_pretrained(tmp_path / "s", trust_remote_code=True)):
        assert type(again).__name__ == "MineForCausalLM" and torch.equal(logits(again), logits(student))
    again.save_pretrained(tmp_path / "t")
    assert torch.equal(logits(load_student(tmp_path / "t", trust_remote_code=True)), logits(student))


def test_save_errors(tmp_path):
    student = student_of()
    (tmp_path / "full").mkdir(); (tmp_path / "full/x").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"): save_student(student, tmp_path / "full")
    assert (tmp_path / "full/x").read_text() == "mine"
    with torch.no_grad(): patch_modules(student)[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"): save_student(student, tmp_path / "nan")
    assert not (tmp_path / "nan").exists()
    student = student_of(); del student.config.linearpatch
    with pytest.raises(ValueError, match="records 0"): save_student(student, tmp_path / "lost")
    with pytest.raises(ValueError, match="no student.*save_pretrained"): save_student(make("llama"), tmp_path / "teacher")


# -- the three doors, without this library

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
    names = ["llama", "llama-tied", "qwen2", "gemma2", "gemma3", "gemma3-vision", "gpt2", "opt", "falcon", "qwen3-moe"]
    mask = (PAD != 2).long()
    for name in names:
        student = student_of(name, "many", dtype="float32")
        save_student(student, tmp_path / "in" / name, max_shard_size="20KB")
        torch.save((PAD, mask, logits(student, PAD), new_tokens(student, PAD, attention_mask=mask)), tmp_path / "in" / name / "expected")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", doors, str(tmp_path / "in"), str(tmp_path)], capture_output=True, text=True, cwd=tmp_path,
                          env=env, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    for name in names:
        out = told[name]
        assert out["refused"][0] is True and out["refused"][2] is True, f"{name}: {out['refused']}"
        assert out["refused"][1] != "loads!" and out["refused"][3] in (True, out["name"])
        assert out["same"] and out["tokens"] and out["again"] and not out["training"], f"{name}: {out}"
        student = load_student(tmp_path / name) # what it wrote, here
        assert torch.equal(logits(student, PAD), torch.load(tmp_path / "in" / name / "expected")[2])


def test_load_model_refuses_students(saved):
    for trust in (False, True):
        with pytest.raises(ValueError, match="patched student.*linearpatch.load"): load_model(saved / "student", trust_remote_code=trust)
