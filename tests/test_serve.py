"A plain student in an engine that is not transformers (extra: serve)."

import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers as tf
from tiny import FakePatch, headed, liven, llama

from linearpatch.method.calibration import load_windows
from linearpatch.method.folding import fold
from linearpatch.method.models import *
from linearpatch.method.pruning import prune
from linearpatch.workshop.architectures import *
from linearpatch.workshop.checkpoint import save_student
from linearpatch.workshop.cuts import *
from linearpatch.workshop.forward import *

ctranslate2 = pytest.importorskip("ctranslate2")
PROMPTS = ["The old man came to the river", "It was", "She looked at him, and"]
plain = dict(rope_type="default", rope_theta=10000.0)


pytestmark = pytest.mark.usefixtures("quiet")


def serve(folder, out, **kw):
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(folder)).convert(str(out), **kw)
    return ctranslate2.Generator(str(out), intra_threads=1)


def folded_student(model, cut=Cut(2, 4)):
    "With a scaled rotation at the cut, folded."
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(
        torch.randn(hidden_size(model), hidden_size(model), generator=g, dtype=torch.float64)
    )[0]
    return fold(prune(model, cut, FakePatch(1.5 * Q, cut)))


def same_answers(model, tokenizer, engine, n=30):
    "Scores of every position of a batch of prompts, and greedy tokens."
    texts = [tokenizer.convert_ids_to_tokens(tokenizer(p).input_ids) for p in PROMPTS]
    replies = engine.generate_batch(
        texts, max_length=n, include_prompt_in_result=False, end_token=[]
    )
    for prompt, text, reply in zip(PROMPTS, texts, replies):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            ours = model(ids).logits
        theirs = torch.tensor(np.array(engine.forward_batch([text])))
        assert (ours - theirs).abs().max() < 1e-4 * ours.std()
        out = model.generate(
            ids,
            max_new_tokens=n,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=tokenizer.eos_token_id,
        )[0, ids.shape[1] :]
        assert reply.sequences_ids[0] == out.tolist()


@pytest.mark.parametrize("which", ["playground", "second"])
def test_folded_student(which, second_model, tmp_path):
    model, tokenizer = load_playground() if which == "playground" else second_model
    student = folded_student(model)
    save_student(student, tmp_path / "s", tokenizer)
    same_answers(student, tokenizer, serve(tmp_path / "s", tmp_path / "engine"))


@pytest.mark.parametrize(
    "config",
    [
        lambda **k: tf.LlamaConfig(**llama | k),
        lambda **k: tf.LlamaConfig(**headed | k, tie_word_embeddings=True),
        lambda **k: tf.LlamaConfig(**llama | k | dict(rope_parameters=plain | {"rope_theta": 5e5})),
        lambda **k: tf.MistralConfig(**headed | k, sliding_window=None),
        lambda **k: tf.Qwen2Config(**llama | k),
        lambda **k: tf.Qwen3Config(**headed | k),
    ],
    ids=["llama-2", "tied", "llama-3", "mistral", "qwen2", "qwen3"],
)
def test_architectures(config, tmp_path):
    _, tokenizer = load_playground()
    tokenizer.unk_token = tokenizer.convert_ids_to_tokens(
        2
    )  # the converter wants one for some of them
    torch.manual_seed(0)
    teacher = liven(
        tf.AutoModelForCausalLM.from_config(
            config(vocab_size=len(tokenizer), pad_token_id=None), dtype=torch.float32
        )
    ).eval()
    student = folded_student(teacher)
    save_student(student, tmp_path / "s", tokenizer)
    same_answers(student, tokenizer, serve(tmp_path / "s", tmp_path / "engine"))


def test_without_linearpatch(tmp_path):
    model, tokenizer = load_playground()
    student = folded_student(model)
    save_student(student, tmp_path / "s", tokenizer)
    code = (
        "import sys; sys.modules['linearpatch'] = None\n"
        "from transformers import AutoTokenizer; from ctranslate2 import Generator; from ctranslate2.converters import TransformersConverter\n"
        "TransformersConverter(sys.argv[1]).convert(sys.argv[2]); t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "text = t.convert_ids_to_tokens(t(sys.argv[3]).input_ids)\n"
        "print(*Generator(sys.argv[2]).generate_batch([text], max_length=20, include_prompt_in_result=False, end_token=[])[0].sequences_ids[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "s"), str(tmp_path / "e"), PROMPTS[0]],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    out = student.generate(
        ids,
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=tokenizer.eos_token_id,
    )[0, ids.shape[1] :]
    assert [int(t) for t in done.stdout.split()] == out.tolist()


@pytest.mark.parametrize(
    "code, match", [(False, "contains custom code"), (True, "LinearPatchConfig")]
)
def test_patched_student_is_not_converted(code, match, tmp_path):
    "Its folder is never read as the model without the patch."
    from ctranslate2.converters import TransformersConverter

    model, tokenizer = load_playground()
    save_student(
        prune(model, Cut(2, 4), FakePatch(2 * torch.eye(hidden_size(model)), Cut(2, 4))),
        tmp_path / "s",
        tokenizer,
    )
    with pytest.raises(ValueError, match=match):
        TransformersConverter(str(tmp_path / "s"), trust_remote_code=code).convert(
            str(tmp_path / "e")
        )
    assert not (tmp_path / "e").exists()


def test_eight_bits(tmp_path):
    "The engine's own compression: a quarter of the size, nearly the same perplexity."
    model, tokenizer = load_playground()
    save_student(folded_student(model), tmp_path / "s", tokenizer)
    whole, small = (
        serve(tmp_path / "s", tmp_path / "a"),
        serve(tmp_path / "s", tmp_path / "b", quantization="int8"),
    )
    rows = [
        tokenizer.convert_ids_to_tokens(r)
        for r in load_windows(
            "passages", tokenizer, split="heldout", seq_len=64, samples=16
        ).ids.tolist()
    ]
    a, b = (
        torch.tensor([s for r in e.score_batch(rows) for s in r.log_probs]).mean()
        for e in (whole, small)
    )
    assert (tmp_path / "b/model.bin").stat().st_size < 0.3 * (
        tmp_path / "a/model.bin"
    ).stat().st_size and (a - b).abs() < 0.05
