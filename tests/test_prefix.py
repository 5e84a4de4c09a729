"Students that go on from the teacher's hidden state say what they say alone, for every architecture of the matrix."

import pytest
import torch
from tiny import CONFIGS, make, random_patch

from linearpatch.method.calibration import Windows
from linearpatch.method.models import decoder_layers
from linearpatch.method.pruning import prune
from linearpatch.workshop.cuts import Cut
from linearpatch.workshop.evaluation import kl_divergence, perplexity, score_students
from linearpatch.workshop.forward import run_model
from linearpatch.workshop.prefix import handing_on, run_together, shared_prefix

IDS = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(3, 12, dtype=torch.bool)
MASK[1, :5] = False  # padded on the left
MASK[2, 9:] = False  # and on the right


def students_of(model):
    "Without and with a patch, in the middle and at the end; cuts that the architecture refuses are left out."
    out = {}
    for cut in (Cut(2, 4), Cut(4, 6), Cut(5, 6), Cut(1, 2)):
        for name, patches in (("none", None), ("patched", [random_patch(cut)])):
            try:
                out[f"{cut} {name}"] = prune(model, [cut], patches, share=True)
            except ValueError:
                continue
    return out


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_together_is_alone(name):
    model = make(name)
    students = students_of(model)
    assert students, f"no cut of {name} is possible"
    found = dict(run_together(model, students, IDS, MASK))
    assert list(found) == [None, *students]
    assert not any(
        "forward" in vars(layer) for s in students.values() for layer in decoder_layers(s)
    )
    real = MASK[..., None]
    for who, logits in found.items():
        alone = run_model(students[who] if who else model, IDS, MASK)
        torch.testing.assert_close(logits * real, alone * real, rtol=1e-4, atol=1e-4)
    shared = {who: shared_prefix(model, student) for who, student in students.items()}
    at_the_end = {"Cut[4, 6) patched": 3, "Cut[5, 6) patched": 4}  # on the last kept layer's output
    assert shared == {who: at_the_end.get(who, int(who[4])) for who in students}


@torch.no_grad()
def test_the_shared_layers_do_not_run():
    model = make("llama")
    student, calls = prune(model, [Cut(3, 5)], share=True), []
    for layer in decoder_layers(student):
        layer.mlp.register_forward_hook(lambda m, args, out: calls.append(m))
    run_model(student, IDS, MASK)
    assert len(calls) == 4
    calls.clear()
    for _ in run_together(model, {"student": student}, IDS, MASK):
        pass
    assert calls == [decoder_layers(student)[3].mlp]


def test_an_error_leaves_the_layers_as_they_were():
    model = make("llama")
    before = [layer.forward for layer in decoder_layers(model)]
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        handing_on(model, 2, torch.zeros(1, 2, 32)),
    ):
        raise RuntimeError("on purpose")
    assert [layer.forward for layer in decoder_layers(model)] == before


def test_a_forward_that_accelerate_has_put_there_comes_back():
    model = make("llama")
    layer = decoder_layers(model)[0]
    mine = layer.forward = lambda *args, **kwargs: None
    with handing_on(model, 1, torch.zeros(1, 2, 32)):
        assert layer.forward is not mine
    assert layer.forward is mine


def test_a_copy_shares_nothing():
    model = make("llama")
    assert shared_prefix(model, prune(model, [Cut(3, 5)])) == 0


def test_scores_of_students_run_the_prefix_once():
    "Perplexity and KL as measured one by one, and no shared layer runs in a student."
    model = make("llama")
    students = {"none": prune(model, [Cut(3, 5)], share=True), "copy": prune(model, [Cut(3, 5)])}
    windows, calls = Windows(IDS, MASK), []
    expected = {
        name: (perplexity(student, windows), kl_divergence(model, student, windows))
        for name, student in students.items()
    }
    for layer in decoder_layers(students["none"])[:3]:
        layer.mlp.register_forward_hook(lambda m, args, out: calls.append(m))
    dense, found = score_students(model, students, windows)
    assert dense == pytest.approx(perplexity(model, windows), rel=1e-6) and not calls
    for name, pair in found.items():
        assert pair == pytest.approx(expected[name], rel=1e-5)
