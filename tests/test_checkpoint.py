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
    values = change(values) or values
    if path.name == "linearpatch.json" and isinstance(values, dict): values["sha256"] = checkpoint._digest(values) # as one would who knows the format
    path.write_text(json.dumps(values))


# -- a student and its folder

@pytest.mark.parametrize("name", [*CONFIGS, *MORE])
def test_round_trip(name, tmp_path):
    student = student_of(name, "many")
    code = dict(trust_remote_code=hasattr(student.config, "auto_map"))
    expected, before = logits(student), plain(student.config)
    save_student(student, tmp_path / "s", max_shard_size="20KB")
    assert len(list((tmp_path / "s").glob("model-*.safetensors"))) > 2 and (tmp_path / "s/model.safetensors.index.json").exists()
    again = load_student(tmp_path / "s", **code)
    assert type(again).__name__ == type(student).__name__ and type(again.config).__name__ == type(student.config).__name__ and not again.training
    assert torch.equal(logits(again), expected) and torch.equal(new_tokens(again), new_tokens(student))
    a, b = student.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert again.config.linearpatch == student.config.linearpatch and again.config.linearpatch["cuts"] == [[0, 1], [2, 3], [4, 6]]
    assert plain(again.config) == before, "the config is the one that was saved"
    assert {p.suffix for p in (tmp_path / "s").iterdir()} == {".json", ".safetensors", ".md", ".py"}
    save_student(again, tmp_path / "t") # and once more
    assert torch.equal(logits(load_student(tmp_path / "t", **code)), expected)
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


def test_lm_eval(tmp_path):
    "The evaluation harness takes the folder as it is; its command line makes the same object."
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance
    teacher, tokenizer = load_playground()
    cut = Cut(2, 4)
    student = prune(teacher, cut, patches_for([cut], 64)); save_student(student, tmp_path / "s", tokenizer)
    texts = [("The old man", " went down to the river"), ("It was", " cold")]
    def scores(model):
        model = model if isinstance(model, str) else dict(pretrained=model, tokenizer=tokenizer)
        lm = huggingface.HFLM(**(dict(pretrained=model, trust_remote_code=True) if isinstance(model, str) else model), batch_size=1, device="cpu", dtype="float32")
        return [x for x, _ in lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(texts)], disable_tqdm=True)]
    assert scores(str(tmp_path / "s")) == pytest.approx(scores(student), abs=1e-4)
    with pytest.raises(ValueError, match="trust_remote_code=True"): huggingface.HFLM(pretrained=str(tmp_path / "s"), device="cpu")


def test_load_model_refuses_students(saved):
    for trust in (False, True):
        with pytest.raises(ValueError, match="patched student.*linearpatch.load"): load_model(saved / "student", trust_remote_code=trust)


# -- a patch alone

@pytest.mark.parametrize("name, where", [("llama", "middle"), ("llama", "many"), ("gpt2", "last"), ("gemma3", "first"), ("opt", "many"), ("qwen3-moe", "middle")])
def test_patch_round_trip(name, where, tmp_path):
    teacher, cuts = teacher_of(name), CUTS[where]
    teacher.save_pretrained(tmp_path / "base"), load_playground()[1].save_pretrained(tmp_path / "base")
    patches = patches_for(cuts)
    student = prune(teacher, cuts, patches)
    save_patch(patches, tmp_path / "fitted", base=teacher)
    save_patch(student, tmp_path / "taken")
    for p, q in zip(patches, load_patch(tmp_path / "fitted")): assert torch.equal(p.matrix, q.matrix) and (p.cut, p.family, p.info) == (q.cut, q.family, q.info)
    for folder in ("fitted", "taken"):
        again, tokenizer = load(tmp_path / "base", patch=tmp_path / folder)
        assert torch.equal(logits(again), logits(student)) and torch.equal(new_tokens(again), new_tokens(student))
        assert again.config.linearpatch["cuts"] == student.config.linearpatch["cuts"] and tokenizer is not None and not again.training
    assert {p.name for p in (tmp_path / "taken").iterdir()} == {"patch.safetensors", "linearpatch.json", "README.md"}


def test_patch_of_a_loaded_and_trained_student(tmp_path):
    teacher_of("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base"), load_playground()[1].save_pretrained(tmp_path / "base")
    teacher = load_model(tmp_path / "base")[0] # .to() rounds the frequencies of the positions, loading does not
    student = prune(teacher, CUTS["many"], patches_for(CUTS["many"]), share=True, dtype="float32")
    with torch.no_grad():
        for m in patch_modules(student): m.weight += 1e-4 * torch.randn_like(m.weight)
    save_student(student, tmp_path / "s")
    save_patch(load_student(tmp_path / "s"), tmp_path / "p")
    assert {v.dtype for v in load_file(tmp_path / "p/patch.safetensors").values()} == {torch.float32}
    again, _ = load(tmp_path / "base", patch=tmp_path / "p")
    assert again.dtype == torch.bfloat16 and {m.weight.dtype for m in patch_modules(again)} == {torch.float32}
    assert torch.equal(logits(again), logits(student))


@pytest.mark.filterwarnings("ignore")
def test_patch_of_a_student_that_is_kept_elsewhere(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    student, away = student_of(where="many"), student_of(where="many")
    accelerate.cpu_offload(away, execution_device="cpu")
    assert patch_modules(away)[0].weight.device.type == "meta"
    assert all(torch.equal(p.matrix, q.matrix) for p, q in zip(student_patches(away), student_patches(student)))


def test_some_cuts_without_a_patch(tmp_path):
    teacher, cuts = teacher_of("llama"), CUTS["many"]
    teacher.save_pretrained(tmp_path / "base"), load_playground()[1].save_pretrained(tmp_path / "base")
    patches = patches_for(cuts); patches[1].family, patches[1].matrix = "none", torch.eye(32, dtype=torch.float64)
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
        with pytest.raises(ValueError, match="save the patch that was given to prune"): f()
    patch.mlp = torch.zeros(16, 16)
    with pytest.raises(ValueError, match=r"the mlp of the patch .* \(16, 16\)"): save_patch(patch, tmp_path / "q", base=teacher)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("change, said", [
    (lambda p: p.matrix.fill_(float("nan")), "NaN"), (lambda p: setattr(p, "matrix", torch.eye(16)), r"\(16, 16\)"), (lambda p: setattr(p, "cut", Cut(2, 7)), "out of range")])
def test_bad_patches_are_not_saved(change, said, tmp_path):
    [patch] = patches_for(CUTS["middle"]); change(patch)
    with pytest.raises(ValueError, match=said): save_patch(patch, tmp_path / "p", base=teacher_of("llama"))
    assert not list(tmp_path.iterdir())


def test_patches_need_their_base(tmp_path):
    with pytest.raises(ValueError, match="base=model"): save_patch(patches_for(CUTS["middle"]), tmp_path / "p")
    with pytest.raises(ValueError, match="no patch to save"): save_patch([], tmp_path / "p", base=teacher_of("llama"))
    with pytest.raises(ValueError, match="fit one patch"): save_patch(patches_for([Cut(1, 2), Cut(2, 3)]), tmp_path / "p", base=teacher_of("llama"))


def test_wrong_bases_are_refused(copies):
    def base(change, **config):
        model = make(tf.LlamaConfig(**{**llama, **config}))
        with torch.no_grad(): change(model)
        shutil.rmtree(copies / "base"); model.save_pretrained(copies / "base"), load_playground()[1].save_pretrained(copies / "base")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(checkpoint, "load_model", lambda *a: pytest.fail("the weights were read"))
        for config, said in ((dict(num_hidden_layers=5), "6 layers.* has 5"), (dict(hidden_size=64), "32 channels.* has 64")):
            base(lambda m: None, **config)
            with pytest.raises(ValueError, match=said): load(copies / "base", patch=copies / "patch")
    base(lambda m: m.model.layers[0].mlp.down_proj.weight.mul_(1.01))
    with pytest.raises(ValueError, match="other weights.*fingerprint"): load(copies / "base", patch=copies / "patch")
    base(lambda m: None) # and this is the one
    assert n_layers(load(copies / "base", patch=copies / "patch")[0]) == 2
    with pytest.raises(ValueError, match="patched student"): load(copies / "student", patch=copies / "patch")


# -- bad input

def gone(folder): return [p.name for p in folder.rglob("*") if p.name == "ran"]

class Bomb:
    "Unpickling this creates a file."
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), "w")


PATCH_EDITS = {
    "newer": (lambda r: r.update(version=2), "format version 2.*install a newer"), "version-text": (lambda r: r.update(version="1"), "no format version"),
    "version-none": (lambda r: r.pop("version") and None, "no format version"), "format": (lambda r: r.update(format="peft"), "not the description of a patch"),
    "list": (lambda r: [r], "holds a list"), "up": (lambda r: r["weights"].update(file="../../x.safetensors"), "lies outside"),
    "absolute": (lambda r: r["weights"].update(file="/etc/passwd"), "lies outside"), "dots": (lambda r: r["weights"].update(file=".."), "lies outside|lacks"),
    "number": (lambda r: r["weights"].update(file=3), "lies outside"), "missing": (lambda r: r["weights"].update(file="y.safetensors"), "lacks y"),
    "hash": (lambda r: r["weights"].update(sha256="0" * 64), "SHA-256"), "no-hash": (lambda r: r["weights"].pop("sha256") and None, "does not describe a patch"),
    "no-base": (lambda r: r.pop("base") and None, "does not describe a patch"), "width": (lambda r: r["base"].update(hidden_size=64), r"needs \(64, 64\)"),
    "layers": (lambda r: r["base"].update(n_layers=4), "out of range"), "cut": (lambda r: r["patches"][0].update(cut=[3]), "does not describe a patch"),
    "overlap": (lambda r: r["patches"][0].update(cut=[2, 3]), "overlap"), "fewer": (lambda r: r["patches"].pop() and None, "no patch asks for"),
    "more": (lambda r: r["patches"].insert(2, dict(cut=[3, 4], family="hadamard", info={})), "does not describe|lacks"),
    "family": (lambda r: r["patches"][0].update(family=None), "wrong type"), "dtype": (lambda r: r.update(dtype="load"), "wrong type"),
    "fingerprint": (lambda r: r["base"].update(fingerprint=None), "wrong type"), "bool": (lambda r: r["base"].update(n_layers=True), "wrong type"),
}

@pytest.mark.parametrize("name", PATCH_EDITS)
def test_bad_patch_records(name, copies):
    change, said = PATCH_EDITS[name]
    edit(copies / "patch/linearpatch.json", change)
    with pytest.raises(ValueError, match=said): load_patch(copies / "patch")


@pytest.mark.parametrize("text", ["", "{", "null", "3", '"text"', "[" * 100000, "\x00\xff", '{"a": NaN}'], ids=range(8))
def test_json_that_is_none(text, copies):
    for file, call in (("patch/linearpatch.json", lambda: load_patch(copies / "patch")), ("student/config.json", lambda: load_student(copies / "student")),
                       ("student/config.json", lambda: load(copies / "student"))):
        (copies / file).write_text(text, encoding="latin-1")
        with pytest.raises(ValueError): call()


def test_spoiled_patch_files(copies):
    path, file = copies / "patch", copies / "patch/patch.safetensors"
    whole = file.read_bytes()
    def signed(data):
        file.write_bytes(data)
        edit(path / "linearpatch.json", lambda r: r["weights"].update(sha256=hashlib.sha256(data).hexdigest()))
    for data in (whole[:-1], whole[:8], b"", whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]):
        file.write_bytes(data)
        with pytest.raises(ValueError, match="SHA-256"): load_patch(path)
    for data, said in ((whole[:-1], "no safetensors file"), (b"", "no safetensors file"), (b"PK\x03\x04" + whole, "no safetensors file")):
        signed(data) # whoever alters a file can write its new hash down, too
        with pytest.raises(ValueError, match=said): load_patch(path)
    for change, said in ((lambda t: t["0.matrix"].fill_(float("inf")), "NaN or infinity"), (lambda t: t.update({"0.matrix": torch.eye(8)}), r"\(8, 8\)"),
                         (lambda t: t.pop("1.matrix"), "lacks the matrix"), (lambda t: t.update(x=torch.eye(2)), "no patch asks for")):
        signed(whole); tensors = load_file(file); change(tensors)
        save_file(tensors, file); signed(file.read_bytes())
        with pytest.raises(ValueError, match=said): load_patch(path)
    signed(whole)
    assert len(load_patch(path)) == 3


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_links_that_lead_out(copies, tmp_path):
    for kind, name, call in (("patch", "patch.safetensors", load_patch), ("patch", "linearpatch.json", load_patch), ("student", "model.safetensors", load_student), ("student", "config.json", load_student)):
        path = copies / kind / name
        outside = copies / "elsewhere"; outside.write_bytes(path.read_bytes())
        path.unlink(); path.symlink_to(outside)
        with pytest.raises(ValueError, match="lies outside"): call(copies / kind)
        path.unlink(); path.write_bytes(outside.read_bytes())
        call(copies / kind)
    (copies / "link").symlink_to(copies / "patch") # a link to the whole folder is the user's own
    assert len(load_patch(copies / "link")) == 3
    cache = tmp_path / "models--me--it"; (cache / "snapshots").mkdir(parents=True) # the Hub's cache is made of links
    (cache / "blobs").mkdir(); (cache / "snapshots/abc").mkdir()
    for p in (copies / "patch").iterdir():
        shutil.move(p, cache / "blobs" / p.name); (cache / "snapshots/abc" / p.name).symlink_to(f"../../blobs/{p.name}")
    assert len(load_patch(cache / "snapshots/abc")) == 3


def within(record, **values): record["linearpatch"]["model"].update(values)

STUDENT_EDITS = {
    "newer": (lambda c: c["linearpatch"].update(version=2), "format version 2.*install a newer"), "version": (lambda c: c["linearpatch"].update(version=0), "no format version"),
    "record-list": (lambda c: c.update(linearpatch=[1]), "no student"), "no-model": (lambda c: c["linearpatch"].pop("model") and None, "save the student again with save_student"),
    "model-list": (lambda c: c["linearpatch"].update(model=[1]), "no student that can be loaded"), "layer": (lambda c: c["linearpatch"]["patches"][0].update(layer=9), "no place"),
    "side": (lambda c: c["linearpatch"]["patches"][0].update(side="above"), "no place"), "dtype": (lambda c: c["linearpatch"]["patches"][0].update(dtype="load"), "no place"),
    "type": (lambda c: within(c, model_type="no-such"), "no model type"), "not-a-model": (lambda c: within(c, architecture="pipeline"), "no model 'pipeline'"),
    "no-name": (lambda c: within(c, architecture="NoSuchModel"), "no model 'NoSuchModel'"), "name-type": (lambda c: within(c, architecture=3), "no student that can be loaded"),
    "another-base": (lambda c: within(c, architecture="GPT2LMHeadModel"), "is no 'llama' model"), "key": (lambda c: within(c, layers_key="a.b"), "no student that can be loaded"),
    "place": (lambda c: within(c, layers="model.nowhere"), "can be built"), "more": (lambda c: (c["linearpatch"].update(n_layers=7), within(c, num_hidden_layers=3)) and None, "do not fit.*missing"),
    "fewer": (lambda c: (c["linearpatch"].update(cuts=[[0, 2], [2, 3], [4, 6]]), within(c, num_hidden_layers=1)) and None, "no place|the cuts leave|can be built"), "layers": (lambda c: within(c, num_hidden_layers=5), "the cuts leave 2"),
    "no-patches": (lambda c: c["linearpatch"].update(patches=[]), "do not fit.*unexpected"), "one-less": (lambda c: c["linearpatch"]["patches"].pop() and None, "do not fit.*unexpected"),
    "width": (lambda c: within(c, hidden_size=16), "do not fit.*mismatched"), "huge": (lambda c: within(c, hidden_size=-1), "width"), "remote": (lambda c: within(c, remote=True), "pass trust_remote_code"),
    "vocab": (lambda c: c.update(vocab_size=65), "do not fit.*mismatched"),
}

@pytest.mark.parametrize("name", STUDENT_EDITS)
def test_bad_student_records(name, copies):
    change, said = STUDENT_EDITS[name]
    edit(copies / "student/config.json", change)
    with pytest.raises(ValueError, match=said): load_student(copies / "student")


def test_config_that_claims_more_layers(copies):
    "A plain model, too: transformers would fill the rest with random numbers."
    edit(copies / "base/config.json", lambda c: c.update(num_hidden_layers=8))
    for call in (load, load_model):
        with pytest.raises(ValueError, match="lack.*layers.6"): call(copies / "base")
    student = prune(teacher_of("llama"), CUTS["middle"]); save_student(student, copies / "plain", load_playground()[1])
    edit(copies / "plain/config.json", lambda c: c.update(num_hidden_layers=5))
    for call in (load, load_student):
        with pytest.raises(ValueError, match="do not fit.*layers.4"): call(copies / "plain")


def test_spoiled_student_files(copies):
    folder, file = copies / "student", copies / "student/model.safetensors"
    whole = file.read_bytes()
    for data in (whole[:-1], b"", whole[:8]):
        file.write_bytes(data)
        with pytest.raises(ValueError, match="damaged"): load_student(folder)
    (copies / "base/model.safetensors").write_bytes((copies / "base/model.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"): load(copies / "base")
    file.write_bytes(whole); tensors = load_file(file)
    tensors["model.layers.0.linear_patch.weight"][3, 4] = float("nan"); save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="NaN"): load_student(folder)
    file.unlink()
    with pytest.raises(ValueError, match="no model.safetensors"): load_student(folder)


def test_nothing_is_unpickled(copies):
    for folder, call in ((copies / "student", load_student), (copies / "student", load)):
        (folder / "model.safetensors").unlink(missing_ok=True)
        for name in ("pytorch_model.bin", "model.bin", "training_args.bin", "tf_model.h5"): torch.save(Bomb(folder / "ran"), folder / name)
        with pytest.raises(ValueError, match="opening a pickle can run code"): call(folder)
        with pytest.raises((OSError, ValueError)): tf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    torch.save(Bomb(copies / "ran"), copies / "patch/patch.safetensors")
    with pytest.raises(ValueError): load_patch(copies / "patch")
    assert gone(copies) == []


def test_no_code_of_the_folder_runs(copies):
    for code in (copies / "student").glob("*.py"): code.write_text(f"open({str(copies / 'ran')!r}, 'w')\n" + code.read_text())
    assert load_student(copies / "student") is not None and load(copies / "student")[0] is not None
    with pytest.raises(ValueError): tf.AutoModelForCausalLM.from_pretrained(copies / "student", trust_remote_code=False)
    assert gone(copies) == []
    tf.AutoModelForCausalLM.from_pretrained(copies / "student", trust_remote_code=True)
    assert gone(copies) == ["ran"], "what the user allowed is run"


def test_shards_that_lead_out(tmp_path):
    student = student_of()
    save_student(student, tmp_path / "s", max_shard_size="20KB")
    shutil.copy(next((tmp_path / "s").glob("model-*")), tmp_path / "x.safetensors")
    def change(index): index["weight_map"][next(iter(index["weight_map"]))] = "../x.safetensors"
    edit(tmp_path / "s/model.safetensors.index.json", change)
    with pytest.raises(ValueError, match="lies outside"): load_student(tmp_path / "s")
    (tmp_path / "s/model.safetensors.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(ValueError): load_student(tmp_path / "s")


def test_an_adapter_is_no_part_of_a_student(copies):
    (copies / "student/adapter_config.json").write_text('{"base_model_name_or_path": "../base", "peft_type": "LORA"}')
    with pytest.raises(ValueError, match="adapter"): load_student(copies / "student")


def test_where_there_is_nothing(copies, tmp_path):
    for call in (load, load_student, load_patch):
        with pytest.raises(ValueError, match="there is no folder"): call("./nowhere")
        with pytest.raises(ValueError, match="Hub"): call("nobody/nothing")
    (tmp_path / "empty").mkdir(); (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="no config.json"): load_student(tmp_path / "empty")
    with pytest.raises(ValueError, match="no linearpatch.json"): load_patch(tmp_path / "empty")
    with pytest.raises(ValueError, match="is a file"): load_student(tmp_path / "file")
    with pytest.raises(ValueError, match="no linearpatch.json"): load_patch(tmp_path / "file")
    with pytest.raises(ValueError, match="no student.*load_model"): load_student(copies / "base")
    with pytest.raises(ValueError, match="load\\(base, patch="): load(copies / "patch")
    with pytest.raises(ValueError, match="no linearpatch.json"): load(copies / "base", patch=copies / "student")


# -- cards and the Hub

def front(folder):
    from huggingface_hub import ModelCard
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_cards(tmp_path):
    teacher = teacher_of("llama")
    teacher.config._name_or_path, teacher.config._commit_hash = "meta-llama/Llama-2-7b-hf", "0123abc"
    student = prune(teacher, CUTS["many"], patches_for(CUTS["many"]))
    numbers = dict(perplexity=dict(wikitext2=dict(dense=5.4712, pruned=18.6, patched=8.6, distilled=7.2)), retained=0.9488, command="linearpatch run X --out /secret/place/out", license="llama2",
                   calibration=dict(source="/secret/place/text.txt", samples=128, seq_len=2048),
                   distillation=dict(mode="offline", source="wikitext2", windows=5000, seq_len=2048))
    save_student(student, tmp_path / "s", card=numbers)
    save_patch(student, tmp_path / "p", card=dict(numbers, license=None))
    a, b = front(tmp_path / "s"), front(tmp_path / "p")
    assert a["base_model"] == b["base_model"] == "meta-llama/Llama-2-7b-hf" and (a["library_name"], b["library_name"]) == ("transformers", "linearpatch")
    assert "linearpatch" in a["tags"] and a["license"] == "llama2" and b["license"] == "other" and b["license_link"] == "https://huggingface.co/meta-llama/Llama-2-7b-hf"
    for folder in ("s", "p"):
        text = (tmp_path / folder / "README.md").read_text()
        for part in ("| wikitext2 | 5.47 | 18.60 | 8.60 | 7.20 |", "94.9%", "0123abc", fingerprint(teacher), "layers 0, 2, 4 to 5 (counted from 0) of 6", "hadamard",
                     "128 windows of 2048 tokens of text.txt", "offline, 5000 windows", "linearpatch run X --out out", "Its licence and its terms of use", "linearpatch.load"):
            assert part in text, part
        assert "/secret" not in text
    assert json.loads((tmp_path / "p/linearpatch.json").read_text())["base"]["revision"] == "0123abc"


def test_a_card_without_numbers_claims_none(tmp_path):
    teacher = teacher_of("llama"); teacher.config._name_or_path = str(tmp_path / "private" / "my-model")
    save_student(prune(teacher, CUTS["middle"], patches_for(CUTS["middle"])), tmp_path / "s")
    text = (tmp_path / "s/README.md").read_text()
    assert "No measurements were recorded" in text and "`my-model`" in text and str(tmp_path) not in text and "base_model" not in front(tmp_path / "s")


@pytest.mark.parametrize("alone", [False, True])
def test_push_to_hub(alone, monkeypatch, tmp_path):
    calls = []
    class Hub:
        def __init__(self, token=None): calls.append(("token", token))
        def create_repo(self, repo_id, **kw): calls.append(("create", repo_id, kw)); self.repo_id = "me/" + repo_id; return self
        def upload_folder(self, repo_id, folder_path, **kw):
            calls.append(("upload", repo_id, kw)); shutil.copytree(folder_path, tmp_path / "up"); self.commit_url = "there"; return self
    monkeypatch.setattr(checkpoint, "HfApi", Hub)
    student = student_of(where="many")
    with torch.no_grad(): weight = patch_modules(student)[0].weight; old = weight[0, 0].item(); weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"): push_to_hub(student, "it", alone=alone)
    assert calls == [], "nothing was sent"
    with torch.no_grad(): weight[0, 0] = old
    assert push_to_hub(student, "it", load_playground()[1], alone=alone, private=True, token="t", commit_message="Mine") == "there"
    assert [c[0] for c in calls] == ["token", "create", "upload"] and calls[0][1] == "t" and calls[1][2] == dict(private=True, exist_ok=True)
    assert calls[2][1] == "me/it" and calls[2][2]["commit_message"] == "Mine"
    if alone: assert [torch.equal(p.matrix, q.matrix) for p, q in zip(load_patch(tmp_path / "up"), student_patches(student))] == [True] * 3
    else: assert torch.equal(logits(load_student(tmp_path / "up")), logits(student)) and "model.safetensors.index.json" in calls[2][2]["delete_patterns"]


def test_from_the_hub(saved, monkeypatch):
    "What has a name on the Hub is fetched, but for files that are not read, and loaded from there."
    asked = []
    def fetch(name, ignore_patterns): asked.append(name); assert "*.bin" in ignore_patterns; return str(saved / name.split("/")[1])
    monkeypatch.setattr(checkpoint, "snapshot_download", fetch)
    monkeypatch.setattr(checkpoint.PretrainedConfig, "get_config_dict", classmethod(lambda cls, name, **kw: (json.loads((saved / name.split("/")[1] / "config.json").read_text()), kw)))
    assert torch.equal(logits(load_student("me/student")), logits(student_of(where="many"))) and len(load_patch("me/patch")) == 3
    assert load("me/student")[1] is not None and asked == ["me/student", "me/patch", "me/student"]


# -- all or nothing

def test_output_folder(tmp_path):
    with output_folder(tmp_path / "a/b") as partial:
        (partial / "f").write_text("1"); assert not (tmp_path / "a/b").exists() and partial.parent == tmp_path / "a"
    assert (tmp_path / "a/b/f").read_text() == "1" and os.listdir(tmp_path / "a") == ["b"]
    (tmp_path / "empty").mkdir()
    with output_folder(tmp_path / "empty") as partial: (partial / "f").write_text("2")
    assert (tmp_path / "empty/f").read_text() == "2"
    mask = os.umask(0); os.umask(mask)
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_output_folder_fails(error, tmp_path):
    with pytest.raises(error):
        with output_folder(tmp_path / "a") as partial: (partial / "f").write_text("1"); raise error
    assert os.listdir(tmp_path) == []


def test_output_folder_refuses(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        with output_folder(tmp_path / "file"): raise AssertionError
    with pytest.raises(ValueError, match="not empty"):
        with output_folder(tmp_path): raise AssertionError


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c(tmp_path):
    code = ("import sys, time; from linearpatch.checkpoint import output_folder\n"
            "with output_folder(sys.argv[1]) as p: (p / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "ready\n" and len(os.listdir(tmp_path)) == 1
    process.send_signal(signal.SIGINT); process.wait(30)
    assert process.returncode != 0 and os.listdir(tmp_path) == []


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
        if pid: return os.waitpid(pid, 0)[1] == 0
        left = [n]
        def step(f):
            def wrapped(*a, **k):
                left[0] -= 1
                if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)
                return f(*a, **k)
            return wrapped
        os.replace, os.fsync, Path.write_text, checkpoint.save_file = step(os.replace), step(os.fsync), step(Path.write_text), step(checkpoint.save_file)
        type(student).save_pretrained, Path.chmod = step(type(student).save_pretrained), step(Path.chmod)
        try: save(student, folder)
        except BaseException: os._exit(1)
        os._exit(0)
    killed, n = 0, 0
    while True:
        folder = tmp_path / f"{n}"
        if n % 2: folder.mkdir() # the old one: an empty folder
        lived = attempt(n, folder)
        there = folder.exists() and any(folder.iterdir())
        if there: load_it(folder)
        assert there or not lived
        assert folder.exists() or not n % 2, "the old folder is gone, and the new one is not there"
        if lived: break
        killed, n = killed + 1, n + 1
    assert killed > 6, "the kills came too late"
    assert all(p.name.endswith(".partial") for p in tmp_path.iterdir() if not p.name.isdigit())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes that share their memory")
@pytest.mark.filterwarnings("ignore")
def test_a_kill_at_any_moment(tmp_path):
    "The same by the clock: the kill comes wherever the save happens to be."
    import random, threading
    student = student_of(where="many")
    seen, random_ = set(), random.Random(0)
    for n in range(12):
        folder = tmp_path / f"{n}"
        pid = os.fork()
        if not pid:
            try: save_student(student, folder); os._exit(0)
            except BaseException: os._exit(1)
        timer = threading.Timer(random_.random() * 0.08, lambda: os.kill(pid, signal.SIGKILL)); timer.start()
        status = os.waitpid(pid, 0)[1]; timer.cancel(); timer.join()
        if folder.exists(): assert torch.equal(logits(load_student(folder)), logits(student)); seen.add("new")
        else: assert status == signal.SIGKILL; seen.add("old")
    assert seen


@pytest.mark.parametrize("old, new", [('"n_layers": 6', '"n_layers": 7'), ('"dtype"', '"dtype" '), ('"family": "hadamard"', '"family": "lstsq"'), ("[\n    0,\n    1\n", "[\n    1,\n    2\n")])
def test_an_altered_description_is_refused(copies, old, new):
    path = copies / "patch/linearpatch.json"
    text = path.read_text()
    if old not in text: text = text.replace(" ", "").replace("\n", ""); old, new = (x.replace(" ", "").replace("\n", "") for x in (old, new)) # however it is laid out
    assert old in text
    path.write_text(text.replace(old, new, 1))
    if json.loads(path.read_text()) == json.loads(text): assert load_patch(copies / "patch") # only spaces changed
    else:
        with pytest.raises(ValueError, match="altered"): load_patch(copies / "patch")
