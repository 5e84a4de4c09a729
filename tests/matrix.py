"""Which step works on which architecture: measured on the tiny random models, and written into a page of the site.

python tests/matrix.py    # measure everything again and rewrite the table of nbs/architectures.qmd
"""

import re
import tempfile
from pathlib import Path

import torch
import transformers as tf
from tiny import CONFIGS, IDS, FakePatch, bypass, make, new_tokens, random_patch

from linearpatch.method.folding import fold
from linearpatch.method.hadamard import make_rotation
from linearpatch.method.models import decoder_layers, n_layers, remove_layers
from linearpatch.method.pruning import prune
from linearpatch.workshop.checkpoint import load_student, save_student
from linearpatch.workshop.cuts import Cut

PAGE = Path(__file__).resolve().parent.parent / "nbs" / "architectures.qmd"
BEGIN, END = "<!-- written by tests/matrix.py -->", "<!-- end -->"
MODELS = {  # the tiny model: what people call such models
    "llama-2": "Llama 1 and 2, Vicuna",
    "llama": "TinyLlama, CodeLlama 34B",
    "llama-3": "Llama 3 and 3.1, DeepSeek-R1-Distill-Llama",
    "llama-3.2": "Llama 3.2, SmolLM 2 (tied embeddings)",
    "mistral": "Mistral, Zephyr",
    "mixtral": "Mixtral",
    "qwen2": "Qwen 2 and 2.5",
    "qwen2-r1": "DeepSeek-R1-Distill-Qwen",
    "qwen2-moe": "Qwen 1.5 and 2 MoE",
    "qwen3": "Qwen 3",
    "qwen3-moe": "Qwen 3 MoE",
    "gemma": "Gemma 1",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 (text)",
    "gemma3-images": "Gemma 3 (with images)",
    "gemma4": "Gemma 4 without per-layer embeddings",
    "phi": "Phi 1, 1.5 and 2",
    "phi3": "Phi 3 and 4",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "granite": "Granite 3",
    "smollm3": "SmolLM 3",
    "stablelm": "StableLM 2 1.6B",
    "stablelm-parallel": "StableLM 2 12B",
    "starcoder2": "StarCoder 2",
    "nemotron": "Nemotron, Minitron",
    "glm4": "GLM 4 0414",
    "gpt-oss": "gpt-oss",
    "deepseek-v3": "DeepSeek V3 and R1",
    "cohere": "Command R, Command R+",
    "cohere2": "Command R7B, Command A",
    "falcon": "Falcon 7B",
    "falcon-40b": "Falcon 40B",
    "gpt-neox": "GPT-NeoX, Pythia",
    "gpt-j": "GPT-J",
    "gpt-neo": "GPT-Neo",
    "gpt2": "GPT-2",
    "opt": "OPT",
    "opt-350m": "OPT 350M",
    "bloom": "BLOOM",
    "mpt": "MPT",
    "baichuan2": "in the style of Baichuan 2, with remote code",
}
MLPS = [
    "fc2",
    "mlp.dense_4h_to_h",
    "ffn.down_proj",
    "mlp",
]  # where an MLP's output is seen: what exists of these, the first
CUTS = {
    "middle": [Cut(2, 4)],
    "first": [Cut(0, 2)],
    "last": [Cut(4, 6)],
    "several": [Cut(0, 1), Cut(2, 3), Cut(4, 6)],
}


def logits(model, ids=IDS, **kw):
    with torch.no_grad():
        return model(ids, **kw).logits


def near(a, b, what, rtol=1e-4):
    "AssertionError unless the largest difference is small beside the numbers' own spread."
    gap = ((a - b).abs().max() / b.std()).item()
    assert gap < rtol, f"{what} differ by {gap:.0e} of their spread"


def patches_for(cuts):
    return [random_patch(c, seed=i) for i, c in enumerate(cuts)]


def student_of(teacher, where="several"):
    return prune(teacher, CUTS[where], patches_for(CUTS[where]), share=True)


def written(model, ids, mask=None, n=6, **kw):
    "Greedy tokens, (batch, n), and the scores that chose them."
    out = new_tokens(
        model,
        ids,
        n,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        return_dict_in_generate=True,
        output_logits=True,
        **kw,
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


def same_text(a, b, what, rtol=1e-4):
    near(a[1], b[1], f"the scores {what}", rtol)
    assert torch.equal(a[0], b[0]), f"the tokens {what} differ"


# -- the steps: each raises, or returns nothing


def remove(teacher):
    "The shorter model's logits are those of the intact one whose removed layers are bypassed."
    for cuts in CUTS.values():
        with bypass(decoder_layers(teacher), cuts):
            expected = logits(teacher, use_cache=False)
        student = remove_layers(teacher, cuts, share=True)
        near(logits(student), expected, "logits")
        assert n_layers(student) == 6 - sum(c.n for c in cuts)
        assert (logits(student) - logits(teacher)).abs().max() > 0.1 * expected.std(), (
            "the removed layers did nothing"
        )


def patch(teacher):
    "The same with a matrix at each interface."
    for where, cuts in CUTS.items():
        with bypass(decoder_layers(teacher), cuts, patches_for(cuts)):
            expected = logits(teacher, use_cache=False)
        student = student_of(teacher, where)
        near(logits(student), expected, "logits")
        assert (
            expected - logits(remove_layers(teacher, cuts, share=True))
        ).abs().max() > 0.1 * expected.std(), "the patches do nothing"


def mlp_side(teacher):
    "A second matrix, multiplied into the last MLP before the cut: as if its output were multiplied where it is made."
    cut, T = CUTS["middle"][0], random_patch(None, seed=7).matrix
    patch = random_patch(cut)
    patch.mlp = T
    layer = decoder_layers(teacher)[cut.start - 1]
    writer = layer.get_submodule(
        next(path for path in MLPS if any(name == path for name, _ in layer.named_modules()))
    )

    def times(module, args, out):
        return (out[0] @ T.to(out[0]), *out[1:]) if isinstance(out, tuple) else out @ T.to(out)

    handle = writer.register_forward_hook(times)
    with bypass(decoder_layers(teacher), [cut], [patch]):
        expected = logits(teacher, use_cache=False)
    handle.remove()
    student = prune(teacher, cut, patch, share=True)
    near(logits(student), expected, "logits")
    assert (expected - logits(student_of(teacher, "middle"))).abs().max() > 0.1 * expected.std(), (
        "the second matrix did nothing"
    )


def cache(teacher):
    student = student_of(teacher)
    same_text(
        written(student, IDS, use_cache=True),
        written(student, IDS, use_cache=False),
        "with and without cache",
    )


def padding(teacher):
    "A short prompt padded on the left, beside a longer one, is continued as when alone."
    student, short = student_of(teacher), IDS[:, :5]
    batch = torch.cat([torch.cat([torch.full((1, 3), 2), short], 1), IDS])
    tokens, scores = written(student, batch, torch.tensor([[0] * 3 + [1] * 5, [1] * 8]))
    same_text((tokens[:1], scores[:1]), written(student, short), "padded and alone")
    same_text((tokens[1:], scores[1:]), written(student, IDS), "beside a padded prompt and alone")


def save(teacher):
    "Bit for bit through the disk, read by linearpatch, and by transformers where the code in the folder is allowed to run."
    student, code = student_of(teacher), hasattr(teacher.config, "auto_map")
    with tempfile.TemporaryDirectory() as folder:
        save_student(student, f"{folder}/student")
        loaded = [
            load_student(f"{folder}/student", trust_remote_code=code),
            tf.AutoModelForCausalLM.from_pretrained(
                f"{folder}/student", trust_remote_code=True
            ).eval(),
        ]
    for again in loaded:
        assert torch.equal(logits(again), logits(student)), "logits differ after loading"
        assert torch.equal(new_tokens(again), new_tokens(student)), "tokens differ after loading"


def fold_scalar(teacher):
    folded_equals_patched(teacher, lambda g: 1.5 * torch.eye(32, dtype=torch.float64))


def fold_rotation(teacher):
    folded_equals_patched(
        teacher,
        lambda g: 1.5 * torch.linalg.qr(torch.randn(32, 32, generator=g, dtype=torch.float64))[0],
    )


def folded_equals_patched(teacher, matrix):
    "An exact fold, saved, and read by transformers alone: the same scores and tokens, and no parameter more than without a patch."
    for cuts in CUTS.values():
        g = torch.Generator().manual_seed(0)
        student = prune(teacher, cuts, [FakePatch(matrix(g), c) for c in cuts], share=True)
        near(
            logits(read_plainly(fold(student, share=True))),
            logits(student),
            "folded and patched",
            1e-3,
        )
    folded = fold(student, share=True)
    same_text(written(folded, IDS), written(student, IDS), "folded and patched", 1e-3)
    untied = teacher.config.tie_word_embeddings and not folded.config.tie_word_embeddings
    head = folded.get_output_embeddings().weight.numel() if untied else 0
    assert count(folded) == count(remove_layers(teacher, cuts, share=True)) + head, (
        "there are parameters that pruning alone has not"
    )


def fold_hadamard(teacher):
    "LinearPatch's own patch, nearly exact: the distributions over the next token stay within 0.05 nats."
    d = torch.linspace(0.9, 1.3, 32, dtype=torch.float64)
    H = make_rotation(32).dense(torch.float64)
    student = prune(
        teacher, CUTS["middle"], [FakePatch(H @ d.diag() @ H.T, CUTS["middle"][0])], share=True
    )
    text = torch.randint(3, 64, (8, 16), generator=torch.Generator().manual_seed(1))
    folded = read_plainly(fold(student, text, tolerance=0.05, share=True))
    a, b = (logits(m, text).log_softmax(-1) for m in (student, folded))
    assert (kl := (a.exp() * (a - b)).sum(-1).mean().item()) < 0.05, (
        f"KL {kl:.2g} nats a token after loading"
    )


def count(model):
    return sum(p.numel() for p in model.parameters())


def read_plainly(model):
    "From disk, by transformers as for any model; nothing may be missing or left over."
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again, info = tf.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, trust_remote_code=hasattr(model.config, "auto_map")
        )
    assert not any(info.values()), f"the folder does not fit the class: {info}"
    return again.eval()


STEPS = {
    "remove": remove,
    "patch": patch,
    "MLP side": mlp_side,
    "cache": cache,
    "left padding": padding,
    "save, load": save,
    "fold scalar": fold_scalar,
    "fold rotation": fold_rotation,
    "fold hadamard": fold_hadamard,
}


def reason(error):
    "Why a step failed, in words that are the same for every architecture with the same trouble."
    text = " ".join(str(error).split())
    text = re.sub(
        r"^\w+ cannot be folded( with this patch)?: |,? or keep the student unfolded$|; keep the student unfolded$",
        "",
        text,
    )
    text = re.sub(
        r"^the MLP of layer \d+ of \w+ (.*); choose a patch family.*$", r"the MLP \1", text
    )
    text = re.sub(r"^\S+ (?=is a LayerNorm|stands between)", "a norm ", text)
    text = re.sub(r" \(the logits differ by [^)]*\)", "", text)
    return (
        text
        if isinstance(error, (ValueError, AssertionError))
        else f"{type(error).__name__}, {text}"
    )


def measure(name):
    "{step: 'yes', or 'no: ' and the reason} for one architecture, each step from the intact model on."
    bars, found = tf.utils.logging.is_progress_bar_enabled(), {}
    tf.utils.logging.disable_progress_bar()
    teacher = make(name)
    for step, run in STEPS.items():
        try:
            run(teacher)
            found[step] = "yes"
        except Exception as e:
            found[step] = "no: " + reason(e)
    if bars:
        tf.utils.logging.enable_progress_bar()
    return found


# -- the page


def table(results):
    "Markdown: a row for each architecture, and below it the reasons of what does not work."
    reasons = list(dict.fromkeys(v for row in results.values() for v in row.values() if v != "yes"))
    cell = lambda v: v if v == "yes" else f"no ({reasons.index(v) + 1})"
    head = ["Models", "class", *STEPS]
    rows = [
        [MODELS[name], f"`{class_name(name)}`", *map(cell, row.values())]
        for name, row in results.items()
    ]
    lines = ["| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *rows]]
    if reasons:
        lines += ["", *(f"{i}. {r.removeprefix('no: ')}" for i, r in enumerate(reasons, 1))]
    return "\n".join(lines)


def read(page):
    "The results that stand in the page, as `measure` gives them."
    lines = parts(page)[1].splitlines()
    reasons = {m[1]: "no: " + m[2] for line in lines if (m := re.match(r"(\d+)\. (.*)", line))}
    rows = [
        [c.strip() for c in line.strip("| ").split(" | ")] for line in lines if line.startswith("|")
    ]
    value = lambda cell: cell if cell == "yes" else reasons[re.fullmatch(r"no \((\d+)\)", cell)[1]]
    names = {people: name for name, people in MODELS.items()}
    return {names[row[0]]: dict(zip(rows[0][2:], map(value, row[2:]))) for row in rows[2:]}


def class_name(name):
    with torch.device("meta"):
        return type(
            tf.AutoModelForCausalLM.from_config(CONFIGS[name](), trust_remote_code=True)
        ).__name__


def parts(page):
    "What stands before the table, the table, and what stands after it."
    return re.fullmatch(f"(.*{BEGIN}\n)(.*)(\n{END}.*)", page, re.DOTALL).groups()


if __name__ == "__main__":
    before, _, after = parts(PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(
        before + table({name: measure(name) for name in CONFIGS}) + after, encoding="utf-8"
    )
