"The guard: windows set aside, what is compared on them, and what a run says and does about it."

import json
import math

import pytest
import torch
from test_families import with_bos
from tiny import make

from linearpatch.method.calibration import Windows
from linearpatch.method.families import FAMILIES, fit_patch
from linearpatch.method.mismatch import collect
from linearpatch.method.models import load_playground
from linearpatch.method.pruning import prune
from linearpatch.workshop import guarding
from linearpatch.workshop.cards import student_card
from linearpatch.workshop.cuts import Cut
from linearpatch.workshop.evaluation import kl_divergence
from linearpatch.workshop.guarding import (
    CANDIDATES,
    FIRST,
    Verdict,
    judge,
    rival_patches,
    set_aside,
)
from linearpatch.workshop.options import RunConfig
from linearpatch.workshop.pipeline import run_pipeline
from linearpatch.workshop.request import check_words

CUT = Cut(2, 4)


@pytest.mark.parametrize("n", [1, 3, 4, 5, 9, 32, 33, 128])
def test_windows_set_aside(n):
    ids = torch.arange(n)[:, None].expand(n, 3)
    fitted, held = set_aside(Windows(ids))
    parts = [fitted.ids, *([held.ids] if held else [])]
    assert torch.equal(torch.cat(parts), ids)
    assert (held is None) == (n < 4)
    assert held is None or (len(fitted) % 2 == 0 and len(held) <= 9 and len(held) <= n / 2)


def test_what_is_compared():
    assert rival_patches("hadamard", False, False) == ["none", *CANDIDATES]
    assert rival_patches("procrustes", True, True)[-1] == "procrustes" + FIRST
    assert not any(name.endswith(FIRST) for name in rival_patches("auto", False, True, fold=True))
    assert {name.removesuffix(FIRST) for name in rival_patches("auto", False, True)} <= set(
        FAMILIES
    )


def test_the_divergence_is_that_of_the_students():
    model, w, held = make("llama"), with_bos(), with_bos(4, 24)
    stats = collect(model, w, cuts=[CUT], moments=[CUT], down=True)
    names = ("none", "hadamard", "joint", "joint-refit" + FIRST)
    verdict = judge(model, stats, [CUT], held, "hadamard", names)
    assert tuple(verdict.kl) == names
    for name, first in (("hadamard", False), ("joint-refit" + FIRST, True)):
        patch = fit_patch(stats, CUT, name.removesuffix(FIRST), first=first)
        alone = kl_divergence(model, prune(model, CUT, patch), held)
        assert verdict.kl[name] == pytest.approx(alone, rel=1e-3)


def test_what_a_verdict_says():
    bad = Verdict({"none": 1.0, "hadamard": 2.0, "joint": 0.5}, "hadamard", 8)
    assert bad.hurts and bad.best == "joint"
    assert "hurts" in bad.sentence() and "joint has 0.500" in bad.sentence()
    hopeless = Verdict({"none": 1.0, "hadamard": math.nan}, "hadamard", 8)
    assert hopeless.hurts and hopeless.best == "none" and "no family helps" in hopeless.sentence()
    good = Verdict({"none": 1.0, "hadamard": 0.8, "joint": 0.5}, "hadamard", 8)
    assert not good.hurts and "--patch auto takes it" in good.sentence()
    best = Verdict({"none": 1.0, "joint": 0.5}, "joint", 8)
    assert "is the best of 2" in best.sentence()


def run(tmp_path, **settings):
    model, tokenizer = load_playground()
    common = dict(calibration="passages", eval=("passages",), seq_len=64, samples=24, batch_size=8)
    common |= dict(eval_samples=8, out=tmp_path / "out")
    return run_pipeline(model, tokenizer, **common | settings)


def test_auto_takes_the_best_and_says_so(tmp_path):
    report = run(tmp_path, cuts=((3, 7),), patch="auto")
    guard = report["guard"]
    assert guard["asked"] == guard["best"] == min(guard["kl"], key=guard["kl"].get)
    assert report["patch"] == guard["best"].removesuffix(FIRST)
    assert "is the best of" in report["notes"][0] and guard["windows"] == 6
    ppl = report["perplexity"]["passages"]
    assert ppl["patched"] < ppl["pruned"] and report["evaluation"]["passages"]["windows"] == 8
    said = (tmp_path / "out/model/README.md").read_text()
    assert "calibration windows that it was not fitted to" in said
    assert json.loads((tmp_path / "out/report.json").read_text())["guard"] == guard


def test_a_patch_that_hurts_is_named(tmp_path):
    "Without layer 0 the scale of the last state is of no use: the paper's patch is worse than none."
    report = run(tmp_path, cuts=((0, 6),))
    kl = report["guard"]["kl"]
    assert kl["hadamard"] > kl["none"] and "The patch hadamard hurts" in report["notes"][0]
    assert "The patch does not help here" in (tmp_path / "out/model/README.md").read_text()


def test_the_patch_is_fitted_to_all_windows(tmp_path):
    "What is set aside comes back for the final fit, and a second pass finds the same as a first."
    given = run(tmp_path / "a", cuts=((2, 8),), patch="lstsq")
    chosen = run(tmp_path / "b", remove=6, patch="lstsq")
    assert chosen["cuts"] == given["cuts"] == [[2, 8]]
    for key in ("perplexity", "kl", "guard", "patches"):
        assert chosen[key] == given[key] or chosen[key] == pytest.approx(given[key], rel=1e-4)


def test_a_pass_that_ends_behind_the_cut_has_the_same_sums():
    model, w = make("llama"), with_bos()
    how = dict(cuts=[CUT], moments=[CUT], down=True, batch_size=5)
    whole, part = collect(model, w, **how), collect(model, w, whole=False, **how)
    for name in ("xx", "xy", "zz", "my", "xx_plain"):
        a, b = (getattr(s.moments[CUT], name) for s in (whole, part))
        assert torch.equal(a, b)
    assert torch.equal(whole.abs_sum[: CUT.stop + 1], part.abs_sum[: CUT.stop + 1])
    assert not part.abs_sum[CUT.stop + 1 :].any() and whole.abs_sum[CUT.stop + 1 :].all()
    assert whole.sigma(CUT) == part.sigma(CUT) and whole.cosine == part.cosine


def test_sums_that_do_not_fit_are_left_out_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(guarding, "get_max_memory", lambda: {"cpu": 1e6})
    report = run(tmp_path / "a", cuts=((2, 8),), patch="auto")
    assert "joint" in report["guard"]["kl"] and "joint-refit" not in report["guard"]["kl"]
    with pytest.raises(ValueError, match="need 0.0 GiB.*--patch joint or foldable"):
        run(tmp_path / "b", cuts=((2, 8),), patch="joint-refit")
    assert not (tmp_path / "b/out").exists()


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(patch="none"), "--patch is none"),
        (dict(bos=False), "leave --no-bos out"),
        (dict(fold=True), "cannot be folded"),
        (dict(averaging="mean-of-ratios"), "leave per_layer and averaging"),
    ],
)
def test_no_constant_where_it_cannot_be_had(settings, said):
    config = RunConfig("m", remove=2, calibration="passages", first_token=True, **settings)
    with pytest.raises(ValueError, match=said):
        check_words(config)


def test_cards_say_how_the_patch_did():
    model = make("llama")
    w = with_bos()
    stats = collect(model, w, cuts=[CUT], moments=[CUT])
    student = prune(model, CUT, fit_patch(stats, CUT))
    guard = dict(windows=4, asked="hadamard", best="none", kl={"none": 1.0, "hadamard": 2.0})
    assert "does not help" in student_card(student, dict(guard=guard))
    guard["kl"]["hadamard"] = 0.5
    assert "0.500 nats a token with the patch" in student_card(student, dict(guard=guard))
