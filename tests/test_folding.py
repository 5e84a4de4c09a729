"A folded student is a plain model, whatever the architecture, or a refusal that says why."

import re
import subprocess
import sys

import pytest
import torch
import transformers as tf
from stream_models import ALL, make
from tiny import gpt, llama, new_tokens

from linearpatch.method.calibration import load_windows
from linearpatch.method.families import fit_patch
from linearpatch.method.folding import bases, fold
from linearpatch.method.fusion import Patch
from linearpatch.method.hadamard import make_rotation, random_orthogonal
from linearpatch.method.mismatch import collect
from linearpatch.method.models import decoder_layers, load_model
from linearpatch.method.pruning import patch_modules, prune
from linearpatch.workshop import rewriting
from linearpatch.workshop.checkpoint import load_student, save_student
from linearpatch.workshop.cuts import Cut

C, CUT = 32, Cut(2, 4)
POST = {
    "gemma2",
    "gemma3",
    "gemma3-images",
    "gemma4",
    "olmo2",
    "olmo3",
    "glm4",
}  # a norm behind the writers
LAYERNORM = {
    "stablelm-parallel",
    "falcon-40b",
    "opt",
    "gpt2",
    "gpt-j",
    "gpt-neo",
    "gpt-neox",
    "falcon",
    "bloom",
    "mpt",
    "olmo",
    "stablelm",
    "starcoder2",
    "nemotron",
    "phi",
    "cohere",
    "cohere2",
    "falcon-two-norms",
    "falcon-in-a-row",
}
TEXT = torch.randint(3, 64, (8, 32), generator=torch.Generator().manual_seed(0))
H = make_rotation(C).dense(torch.float64)
D = 0.8 + torch.rand(C, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
P = {
    "scalar": 1.7 * torch.eye(C).double(),
    "rotation": 1.7 * random_orthogonal(C),
    "hadamard": (H * D) @ H.T,
    "diagonal": D.diag(),
    "general": torch.eye(C).double()
    + 0.2 * torch.randn(C, C, generator=torch.Generator().manual_seed(4)).double(),
}
CUTS = {
    "first": [Cut(0, 2)],
    "last": [Cut(4, 6)],
    "two": [Cut(1, 2), Cut(3, 5)],
    "many": [Cut(0, 1), Cut(2, 3), Cut(4, 6)],
}


def student_of(teacher, kind, cuts=(CUT,), **kw):
    return prune(teacher, cuts, [Patch(P[kind], kind, c) for c in cuts], **kw)


def logits(model, ids=TEXT):
    with torch.no_grad():
        return model(ids).logits.float()


def distance(a, b):
    return (logits(a) - logits(b)).abs().max().item()


def assert_plain(folded, teacher, student):
    "No patch, no hook, not one tensor more than the student has without its patches."
    assert (
        type(folded) is type(teacher)
        and patch_modules(folded) == []
        and not folded.config.linearpatch["patches"]
    )
    assert {k: v.shape for k, v in folded.state_dict().items()} == {
        k: v.shape for k, v in student.state_dict().items() if "linear_patch" not in k
    }
    assert not any(
        layer._forward_pre_hooks or layer._forward_hooks or layer._forward_pre_hooks_with_kwargs
        for layer in decoder_layers(folded)
    )


# -- every architecture


@pytest.mark.parametrize("name", ALL)
def test_scalar_is_exact(name):
    teacher = make(name)
    student = student_of(teacher, "scalar", share=True)
    folded = fold(student)
    assert folded.folding.exact and distance(folded, student) < 1e-4
    assert (logits(student) - logits(prune(teacher, CUT, share=True))).abs().max() > 1e-2, (
        "the patch does something"
    )
    assert_plain(folded, teacher, student)
    assert torch.equal(new_tokens(folded), new_tokens(student))


@pytest.mark.parametrize("name", ALL)
def test_rotation_is_exact_or_refused(name):
    student = student_of(make(name), "rotation", share=True)
    if name in POST | LAYERNORM:
        with pytest.raises(
            ValueError,
            match="a gain cannot hold a rotation" if name in POST else "leaves the vector of ones",
        ):
            fold(student)
        return
    folded = fold(student)
    assert folded.folding.exact and distance(folded, student) < 1e-4
    assert torch.equal(new_tokens(folded), new_tokens(student))


@pytest.mark.parametrize("name", ALL)
def test_hadamard_is_near_or_refused(name):
    student = student_of(make(name), "hadamard", share=True)
    if name in POST:
        with pytest.raises(ValueError, match="a gain cannot hold a rotation"):
            fold(student, TEXT, force=True)
        return
    folded = fold(student, TEXT, force=True)
    assert (
        not folded.folding.exact
        and 0 < folded.folding.kl < 0.2
        and max(folded.folding.spread.values()) < 0.2
    )
    bare = prune(make(name), CUT)
    assert (logits(folded) - logits(student)).norm() < 0.5 * (logits(bare) - logits(student)).norm()


@pytest.mark.parametrize("name", ["gemma", "gemma3", "nemotron", "llama"])
def test_trained_gains(name):
    "Gains of 10 to 130, as trained Gemmas have them: whether a norm adds 1 is still told rightly."
    teacher, g = make(name), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, module in teacher.named_modules():
            after = name == "gemma3" and "post" in path  # there the post-norms stay as they are
            if (
                re.search(r"(input|feedforward|attention)_layernorm$|model\.norm$", path)
                and not after
            ):
                module.weight.copy_(10 + 120 * torch.rand(32, generator=g))
    student = student_of(teacher, "scalar", share=True)
    folded = fold(student)
    want = logits(student)
    assert (logits(folded) - want).norm() < 1e-4 * want.norm()
    assert torch.equal(new_tokens(folded), new_tokens(student))
    if name == "gemma":
        student = student_of(teacher, "rotation", share=True)
        assert distance(fold(student), student) < 1e-3 * logits(student).abs().max()


@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo2", "qwen3-moe"])
def test_diagonal_needs_no_rotation(name):
    student = student_of(make(name), "diagonal", share=True)
    folded = fold(student, TEXT, force=True)
    assert folded.folding.kl < 0.2
    if (
        name == "olmo2"
    ):  # it reads the stream raw: only the last norm would see another size, none upstream
        assert folded.folding.exact and distance(folded, student) < 1e-4


# -- every place


@pytest.mark.parametrize("where", CUTS)
@pytest.mark.parametrize("kind", ["scalar", "rotation"])
@pytest.mark.parametrize("name", ["llama", "smollm3"])  # untied and tied
def test_places(name, kind, where):
    teacher = make(name)
    student = student_of(teacher, kind, CUTS[where])
    folded = fold(student)
    assert folded.folding.exact and distance(folded, student) < 1e-4
    assert_plain(folded, teacher, student)
    assert [p["cut"] for p in folded.config.linearpatch["folded"]] == [
        [c.start, c.stop] for c in CUTS[where]
    ]


@pytest.mark.parametrize("kind", P)
def test_anything_folds_into_the_embedding(kind):
    student = student_of(make("llama"), kind, CUTS["first"])
    folded = fold(student)
    assert folded.folding.exact and distance(folded, student) < 1e-4
    assert [
        k for k, p in folded.named_parameters() if not torch.equal(p, student.get_parameter(k))
    ] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("where", ["two", "many"])
def test_several_near_folds(where):
    student = student_of(make("llama"), "hadamard", CUTS[where])
    reports = [fold(student, TEXT, home=h, force=True).folding for h in (0, 0.5, 1, 1.5, 2)]
    best = fold(student, TEXT, force=True).folding
    assert best.kl <= min(r.kl for r in reports) + 1e-9 and not best.exact


def test_home_leaves_its_segment_alone():
    student = student_of(make("llama"), "general")
    for home, layer in ((0, 0), (1, 3)):
        folded = fold(student, TEXT, home=home, force=True, share=True)
        same = [
            w is v
            for w, v in zip(
                decoder_layers(folded)[layer].parameters(),
                (p for k, p in decoder_layers(student)[layer].named_parameters()),
            )
        ]
        assert all(same)


# -- memory


def test_teacher_and_student_stay_as_they_are():
    teacher = make("smollm3")
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student = student_of(teacher, "rotation", share=True)
    old = logits(student)
    folded = fold(student)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items()) and torch.equal(
        logits(student), old
    )
    assert (
        len(patch_modules(student)) == 1
        and student.config.tie_word_embeddings
        and student.config.linearpatch["folded"] == []
    )
    theirs = {p.data_ptr() for p in [*teacher.parameters(), *student.parameters()]}
    assert not any(p.data_ptr() in theirs for p in folded.parameters()), (
        "the folded model has tensors of its own"
    )
    shared = fold(student, share=True)
    assert any(p.data_ptr() in theirs for p in shared.parameters()) and torch.equal(
        logits(shared), logits(folded)
    )


def test_inplace():
    student = student_of(make("smollm3"), "rotation")
    want, other = logits(student), fold(student)
    assert (
        fold(student, inplace=True) is student
        and patch_modules(student) == []
        and not student.config.tie_word_embeddings
    )
    assert (logits(student) - want).abs().max() < 1e-4 and torch.equal(
        logits(student), logits(other)
    )
    with pytest.raises(ValueError, match="nothing to fold"):
        fold(student)


@pytest.mark.parametrize("kind, text", [("general", TEXT), ("hadamard", None)])
def test_a_refusal_changes_nothing(kind, text):
    student = student_of(make("llama"), kind).train()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    with pytest.raises(ValueError):
        fold(student, text, tolerance=1e-6, inplace=True)
    assert (
        student.training
        and all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
        and len(patch_modules(student)) == 1
    )


@pytest.mark.parametrize("kind", ["scalar", "rotation", "general"])
def test_tying(kind):
    student = student_of(make("smollm3"), kind)
    folded = fold(student, TEXT, force=True)
    tied = kind == "scalar"  # the last norm ignores scale, so that the head may stay
    assert folded.folding.untied != tied and folded.config.tie_word_embeddings == tied
    assert (folded.lm_head.weight is folded.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("kind", ["scalar", "rotation"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind, dtype):
    exact = student_of(make("qwen3"), kind)
    student = student_of(make("qwen3").to(dtype), kind)
    folded = fold(student)
    assert {p.dtype for p in folded.parameters()} == {dtype} and folded.folding.exact
    noise = (logits(student) - logits(exact)).norm()
    assert (logits(folded) - logits(exact)).norm() < 3 * noise, (
        "no worse than what half precision costs anyway"
    )


def test_float64_sums_are_rounded_once():
    student = student_of(make("llama"), "rotation")
    folded, w = fold(student, home=0), decoder_layers(student)[3].self_attn.o_proj.weight
    B = torch.linalg.inv(1.7 * random_orthogonal(C))
    assert (
        decoder_layers(folded)[3].self_attn.o_proj.weight - (B.T @ w.double()).float()
    ).abs().max() < 1e-6


# -- elsewhere

CODE = """if True:
    import sys
    sys.modules["linearpatch"] = None
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    ids = torch.tensor([[0, 5, 9, 33, 12, 7, 40, 8]])
    with torch.no_grad(): logits = model(ids).logits
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=2)
    tokens = model.generate(ids, **options)
    torch.save((type(model).__name__, logits, tokens), sys.argv[2])
"""


@pytest.mark.parametrize(
    "name, kind",
    [
        ("llama", "rotation"),
        ("smollm3", "rotation"),
        ("gemma3", "scalar"),
        ("gpt2", "hadamard"),
        ("mixtral", "hadamard"),
    ],
)
def test_loads_without_linearpatch(name, kind, tmp_path):
    student = student_of(make(name), kind)
    folded = fold(student, TEXT, force=True)
    save_student(folded, tmp_path / "m")
    subprocess.run(
        [sys.executable, "-c", CODE, tmp_path / "m", tmp_path / "out.pt"],
        check=True,
        capture_output=True,
    )
    kind_of, there, tokens = torch.load(tmp_path / "out.pt")
    ids = torch.tensor([[0, 5, 9, 33, 12, 7, 40, 8]])
    assert (
        kind_of == type(folded).__name__
        and torch.equal(there, logits(folded, ids))
        and torch.equal(tokens, new_tokens(folded))
    )


def test_saved_student_folds_and_loads_plainly(tmp_path):
    student = student_of(make("llama"), "rotation")
    student.generation_config.eos_token_id = None
    save_student(student, tmp_path / "s")
    folded = fold(load_student(tmp_path / "s"))
    save_student(folded, tmp_path / "f")
    again = load_student(tmp_path / "f")
    assert (
        torch.equal(logits(again), logits(folded))
        and again.config.linearpatch["folded"][0]["exact"]
    )


# -- refusals


def test_bad_input():
    teacher = make("llama")
    student = student_of(teacher, "hadamard")
    for call, words in [
        (lambda: fold(teacher), "nothing to fold"),
        (lambda: fold(prune(teacher, CUT)), "nothing to fold"),
        (lambda: fold(student), "give calibration windows"),
        (lambda: fold(student, TEXT[:0]), "no windows"),
        (lambda: fold(student, TEXT, tolerance=-1), "tolerance is -1"),
        (lambda: fold(student, TEXT, tolerance=float("nan")), "tolerance is nan"),
        (lambda: fold(student, TEXT, inplace=True, share=True), "choose one"),
        (lambda: fold(student, TEXT, home=2), "home is 2: choose one of 0, 0.5, 1"),
        (
            lambda: fold(student_of(teacher, "general"), TEXT, tolerance=1e-4),
            "above the tolerance of 0.0001",
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize(
    "matrix, words",
    [
        (torch.ones(C, C), "singular"),
        (torch.full((C, C), float("nan")), "NaN"),
        (torch.zeros(C, C), "singular"),
    ],
)
def test_bad_patch(matrix, words):
    student = student_of(make("llama"), "scalar")
    with torch.no_grad():
        patch_modules(student)[0].weight.copy_(matrix)
    with pytest.raises(ValueError, match=words):
        fold(student)


def test_offloaded():
    from accelerate import cpu_offload

    with pytest.raises(ValueError, match="not in memory"):
        fold(cpu_offload(student_of(make("llama"), "scalar"), execution_device="cpu"))


ODD = {
    "normalised residual": lambda: tf.BloomConfig(
        vocab_size=64,
        hidden_size=32,
        n_layer=6,
        n_head=4,
        apply_residual_connection_post_layernorm=True,
    ),
    "post-norm": lambda: tf.OPTConfig(
        **gpt, ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=False
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_other_streams_are_found_out(name):
    with pytest.raises(ValueError, match="cannot be folded"):
        fold(student_of(make(ODD[name]()), "scalar"))


def test_a_hidden_reader_is_found_out():
    "A layer that does something behind anatomy's back."

    class Odd(tf.LlamaForCausalLM):
        pass

    student = student_of(make("llama"), "rotation")
    student.__class__ = Odd
    handle = decoder_layers(student)[3].register_forward_hook(
        lambda m, a, out: out + out.abs().sqrt()
    )
    with pytest.raises(ValueError, match="Odd cannot be folded: behind layer 3"):
        fold(student, home=0)
    assert fold(student).folding.home == 1  # the other side does not touch it
    handle.remove()
    assert fold(student).folding.exact


# -- the pieces


def test_bases():
    for k in (1, 2, 3):
        matrices = [P["general"], P["hadamard"], P["rotation"]][:k]
        for home in torch.arange(0, k + 0.5, 0.5).tolist():
            B = bases(matrices, home)
            assert len(B) == k + 1
            for j in range(k):
                torch.testing.assert_close(B[j], matrices[j] @ B[j + 1])
            if home == int(home):
                assert torch.equal(B[int(home)], torch.eye(C).double())
            else:  # both sides see the same singular values, one the inverse of the other
                s, t = torch.linalg.svdvals(B[int(home)]), torch.linalg.svdvals(B[int(home) + 1])
                torch.testing.assert_close(s, 1 / t.flip(0))


def test_an_inverse_is_computed_once_for_a_basis(monkeypatch):
    "Not for every reader and every norm: at width 4096 each takes a third of a second."
    asked, inverse = [], rewriting.inverse

    def count(B):
        asked.append(B.data_ptr())
        return inverse(B)

    monkeypatch.setattr(rewriting, "inverse", count)
    student = student_of(make("llama"), "general", (Cut(1, 2), Cut(3, 5)))
    fold(student, TEXT, home=1, force=True)
    assert len(asked) == len(set(asked)) == 2  # three segments, one of them as it was


def test_width_decides():
    "The same relative spread of d: a wider model folds better."

    def one(width):
        config = tf.LlamaConfig(
            **(llama | dict(hidden_size=width, intermediate_size=64, num_key_value_heads=4))
        )
        R = make_rotation(width).dense(torch.float64)
        d = torch.linspace(1, 2, width).double()[
            torch.randperm(width, generator=torch.Generator().manual_seed(0))
        ]
        teacher = make(config)
        return fold(
            prune(teacher, CUT, Patch((R * d) @ R.T, "hadamard", CUT)), TEXT, force=True, home=0.5
        ).folding

    narrow, wide = one(32), one(512)
    mean = lambda f: sum(f.spread.values()) / len(f.spread)
    assert 2.5 < mean(narrow) / mean(wide) < 6  # 4 if it falls as the root


# -- a trained model that no chapter has looked at


@pytest.fixture(scope="module")
def trained(second_model):
    model, tokenizer = second_model
    windows = load_windows("passages", tokenizer, seq_len=128, samples=48)
    stats = collect(model, windows, n_remove=4, moments="all", batch_size=16)
    cut = max(stats.cosine, key=stats.cosine.get)
    return windows, {
        f: prune(model, cut, fit_patch(stats, cut, f), share=True)
        for f in ("scalar", "procrustes", "hadamard", "lstsq")
    }


@pytest.mark.parametrize("family", ["scalar", "procrustes"])
def test_trained_exact(trained, family):
    windows, students = trained
    assert (
        logits(fold(students[family]), windows.ids[:8]) - logits(students[family], windows.ids[:8])
    ).abs().max() < 1e-4


def test_trained_near(trained):
    windows, students = trained
    folding = fold(students["hadamard"], windows).folding
    assert (
        abs(folding.perplexity[1] / folding.perplexity[0] - 1) < 0.01
        and folding.kl < 0.005
        and max(folding.spread.values()) < 0.03
    )
    with pytest.raises(ValueError, match="above the tolerance"):
        fold(students["lstsq"], windows)


# -- the pipeline and the command line

SMALL = dict(calibration="passages", seq_len=128, samples=32, batch_size=16)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A run with --fold, and two without."
    from linearpatch.workshop.pipeline import run_pipeline

    place = tmp_path_factory.mktemp("runs")
    reports = {
        name: run_pipeline(
            "playground",
            remove=4,
            eval=("passages",),
            out=place / name,
            patch=patch,
            fold=name == "folded",
            **SMALL,
        )
        for name, patch in (
            ("folded", "hadamard"),
            ("lstsq", "lstsq"),
            ("procrustes", "procrustes"),
        )
    }
    return place, reports


def test_run_folds(saved):
    place, reports = saved
    report, config = reports["folded"], tf.AutoConfig.from_pretrained(place / "folded" / "model")
    families = report["families"]["passages"]
    assert (
        families["folded"] == pytest.approx(families["hadamard"], rel=0.01)
        and families["folded"] != families["hadamard"]
    )
    assert any("folded" in note for note in report["notes"]) and "--fold" in report["command"]
    assert (
        config.linearpatch["patches"] == []
        and config.linearpatch["folded"][0]["family"] == "hadamard"
    )
    plain, tokenizer = load_model(place / "folded" / "model")
    from linearpatch.workshop.evaluation import perplexity

    heldout = load_windows("passages", tokenizer, split="heldout", seq_len=128, samples=None)
    assert perplexity(plain, heldout, 16) == pytest.approx(families["folded"], rel=1e-4)


def test_run_says_why_not(tmp_path):
    from linearpatch.workshop.pipeline import run_pipeline

    report = run_pipeline(
        "playground",
        remove=6,
        eval=("passages",),
        out=tmp_path / "r",
        patch="lstsq",
        fold=True,
        **SMALL,
    )
    assert (
        any("Not folded" in note and "above the tolerance" in note for note in report["notes"])
        and "folded" not in report["families"]["passages"]
    )
    assert len(patch_modules(load_student(tmp_path / "r" / "model"))) == 1
    with pytest.raises(ValueError, match="--patch is none"):
        run_pipeline("playground", remove=6, patch="none", fold=True, **SMALL)


def test_fold_job(saved, tmp_path):
    from linearpatch.workshop.saved import fold_saved_student

    place, _ = saved

    def no_text(*a, **k):
        raise AssertionError("an exact fold needs no text")

    with pytest.MonkeyPatch.context() as m:
        m.setattr("linearpatch.workshop.saved.load_windows", no_text)
        folding = fold_saved_student(
            place / "procrustes", tmp_path / "exact", "passages", seq_len=128
        )
    assert folding.exact
    plain, student = load_model(tmp_path / "exact")[0], load_student(place / "procrustes" / "model")
    ids = load_windows("passages", load_model(tmp_path / "exact")[1], seq_len=128, samples=2).ids
    assert (logits(plain, ids) - logits(student, ids)).abs().max() < 1e-4
    for call, words in [
        (
            lambda: fold_saved_student(
                place / "lstsq",
                tmp_path / "new",
                "passages",
                seq_len=128,
                samples=8,
                tolerance=1e-4,
            ),
            "above the tolerance of 0.0001",
        ),
        (
            lambda: fold_saved_student(place / "folded", tmp_path / "new"),
            "holds no patched student",
        ),
        (lambda: fold_saved_student(place / "nowhere", tmp_path / "new"), "there is no folder"),
        (
            lambda: fold_saved_student(
                place / "lstsq", tmp_path / "exact", "passages", seq_len=128
            ),
            "not empty",
        ),
        (
            lambda: fold_saved_student(place / "lstsq", tmp_path / "new", "no-text", seq_len=128),
            "neither a file nor",
        ),
        (
            lambda: fold_saved_student(place / "lstsq", tmp_path / "new", "passages", seq_len=2048),
            "positions: give less",
        ),
        (
            lambda: fold_saved_student(place / "lstsq", tmp_path / "new", "passages"),
            "32 windows x 1023 tokens",
        ),  # as long as the model can read
    ]:
        with pytest.raises(ValueError, match=words):
            call()
        assert not (tmp_path / "new").exists()


def test_command(saved, tmp_path, capsys):
    from linearpatch.workshop.cli import main

    words = [
        "fold",
        str(saved[0] / "lstsq"),
        "--calibration",
        "passages",
        "--seq-len",
        "128",
        "--samples",
        "8",
        "--out",
        str(tmp_path / "new"),
    ]
    with pytest.raises(SystemExit) as end:
        main([*words, "--tolerance", "0.0001"])
    assert (
        end.value.code == 2
        and "--force" in capsys.readouterr().err
        and not (tmp_path / "new").exists()
    )
    with pytest.raises(SystemExit) as end:
        main([*words, "--tolerance", "0.0001", "--force"])
    assert end.value.code == 0 and "Folding approximate" in capsys.readouterr().out
    assert tf.AutoModelForCausalLM.from_pretrained(tmp_path / "new").config.num_hidden_layers == 8


def test_foldable_family_is_free(second_model):
    "A scaled rotation of the stream and a matrix in the MLP before it: both vanish."
    model, tokenizer = second_model
    windows = load_windows("passages", tokenizer, seq_len=128, samples=48)
    stats = collect(model, windows, n_remove=3, moments="all", batch_size=16)
    cut = max((c for c in stats.cuts if c.start), key=stats.cosine.get)
    patch = fit_patch(stats, cut, "foldable")
    student = prune(model, cut, patch, share=True)
    folded = fold(student)
    assert (
        patch.mlp is not None
        and folded.folding.exact
        and (logits(folded, windows.ids[:8]) - logits(student, windows.ids[:8])).abs().max() < 1e-4
    )
    assert [p["family"] for p in folded.config.linearpatch["folded"]] == [
        "foldable",
        "foldable",
    ]  # the MLP's part, then the rotation


def test_refined_bases(trained):
    "Fitted bases fold better than those chosen by symmetry, on text outside the fit too."
    windows, students = trained
    fit, other = windows[:24], windows[24:]
    for family, least in (("hadamard", 0.9), ("lstsq", 0.7)):
        plain, fitted = (
            fold(students[family], fit, refine=steps, force=True, share=True) for steps in (0, 60)
        )
        assert fitted.folding.kl < least * plain.folding.kl
        p, a, b = (logits(m, other.ids).log_softmax(-1) for m in (students[family], plain, fitted))
        kl = [(p.exp() * (p - q)).sum(-1).mean() for q in (a, b)]
        assert kl[1] < least * kl[0]


def test_refine_is_refused():
    with pytest.raises(ValueError, match="use refine=0"):
        fold(student_of(make("gpt2"), "hadamard"), TEXT, refine=5)
    with pytest.raises(ValueError, match="refine is -1"):
        fold(student_of(make("llama"), "hadamard"), TEXT, refine=-1)
    exact = fold(student_of(make("llama"), "scalar"), TEXT, refine=5)  # nothing to fit
    assert exact.folding.exact


def test_refine_with_several_cuts():
    student = student_of(make("llama"), "hadamard", CUTS["two"])
    plain, fitted = (fold(student, TEXT, refine=steps, force=True).folding for steps in (0, 60))
    assert fitted.kl < plain.kl and not fitted.exact
