"What nbs/architectures.qmd says of each architecture is so."

import matrix
import pytest
import torch
import transformers as tf
from matrix import MODELS, PAGE, measure, parts, read, table
from tiny import CONFIGS, FakePatch, make, old

from linearpatch.method.pruning import patch_modules
from linearpatch.workshop.cuts import Cut


@pytest.mark.parametrize("name", CONFIGS)
def test_row(name):
    assert measure(name) == read(PAGE.read_text(encoding="utf-8"))[name], (
        "run python tests/matrix.py"
    )


def test_page():
    page = PAGE.read_text(encoding="utf-8")
    results = read(page)
    assert list(results) == list(MODELS) == list(CONFIGS) and table(results) == parts(page)[1], (
        "run python tests/matrix.py"
    )
    for step in ("remove", "patch", "cache", "left padding", "save, load"):
        assert {row[step] for row in results.values()} == {"yes"}
    assert {name for name, row in results.items() if row["fold scalar"] != "yes"} == {
        "opt-350m"
    }  # its norms stand in the stream itself


def test_hadamard_under_a_layer_norm_needs_a_power_of_two():
    "As the page says of GPT-2, whose width is 768: here 48."
    teacher = make(tf.GPT2Config(**old | {"n_embd": 48}))
    H = matrix.make_rotation(48).dense(torch.float64)
    student = matrix.prune(
        teacher,
        Cut(2, 4),
        FakePatch(H @ torch.linspace(0.9, 1.3, 48, dtype=torch.float64).diag() @ H.T, Cut(2, 4)),
    )
    with pytest.raises(ValueError, match="power of two"):
        matrix.fold(student, torch.randint(3, 64, (4, 16)))


# -- and the measurement can say no


def broken(monkeypatch, what, do):
    whole = getattr(matrix, what)

    def wrong(*args, **kw):
        out = whole(*args, **kw)
        with torch.no_grad():
            return do(out) or out

    monkeypatch.setattr(matrix, what, wrong)
    return {step: answer.split(":")[0] for step, answer in measure("llama").items()}


def test_it_sees_a_wrong_fold(monkeypatch):
    found = broken(
        monkeypatch,
        "fold",
        lambda s: setattr(s.model.norm, "weight", torch.nn.Parameter(2 * s.model.norm.weight)),
    )
    assert {found[step] for step in ("fold scalar", "fold rotation", "fold hadamard")} == {
        "no"
    } and found["patch"] == "yes"


def test_it_sees_an_mlp_left_alone(monkeypatch):
    monkeypatch.setattr("linearpatch.method.pruning.multiply_mlp", lambda layer, T: None)
    assert [step for step, answer in measure("llama").items() if answer != "yes"] == ["MLP side"]


def renumber(student):
    for i, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = i + 1


def test_it_sees_a_wrong_patch(monkeypatch):
    found = broken(
        monkeypatch,
        "prune",
        lambda s: [m.weight.copy_(m.weight.T.clone()) for m in patch_modules(s)] and s,
    )
    assert found["patch"] == "no" and found["remove"] == "yes"


def test_it_sees_wrong_indices(monkeypatch):
    found = broken(monkeypatch, "prune", renumber)
    assert found["cache"] == found["left padding"] == "no" and found["remove"] == "yes"


def test_it_sees_padding_that_is_looked_at(monkeypatch):
    found = broken(
        monkeypatch,
        "prune",
        lambda s: setattr(
            s, "forward", lambda *a, f=s.forward, **k: f(*a, **k | {"attention_mask": None})
        ),
    )
    assert found["left padding"] == "no" and found["patch"] == "yes"


def test_it_sees_a_lost_patch(monkeypatch):
    found = broken(
        monkeypatch,
        "load_student",
        lambda s: [m.weight.copy_(torch.eye(32)) for m in patch_modules(s)] and s,
    )
    assert found["save, load"] == "no" and found["patch"] == "yes"
