"The record of a run and its page: the schema holds, the words fit the numbers and the student."

import json
import math
import re

import pytest
import torch
from tiny import random_patch
from transformers import AutoModelForCausalLM

from linearpatch.method.calibration import load_windows
from linearpatch.method.families import fit_patch
from linearpatch.method.folding import fold
from linearpatch.method.mismatch import collect
from linearpatch.method.models import load_playground
from linearpatch.method.pruning import prune
from linearpatch.workshop.checkpoint import save_student
from linearpatch.workshop.cuts import Cut
from linearpatch.workshop.figures import CAPTIONS
from linearpatch.workshop.page import page, save_report
from linearpatch.workshop.pipeline import run_pipeline
from linearpatch.workshop.report import (
    Report,
    cuts_text,
    describe_model,
    fold_note,
    gap_closed,
    headline,
    kl_note,
    parameters_if_folded,
    rows,
    table,
    verdict,
)
from linearpatch.workshop.schema import (
    DISTILLATION,
    REPORT_VERSION,
    SCHEMA,
    TASKS,
    check_report,
    plain,
    schema_table,
    upgrade,
)
from linearpatch.workshop.tables import aligned, markdown, number, percent


@pytest.fixture
def record():
    perplexity = dict(dense=10.0, pruned=30.0, patched=20.0)
    return Report(
        schema=REPORT_VERSION,
        command="linearpatch run m --remove 2",
        cuts=[[2, 4]],
        metric="cosine",
        patch="hadamard",
        seed=0,
        notes=[],
        model=dict(
            name="some/m",
            architecture="LlamaForCausalLM",
            layers=6,
            layers_after=4,
            hidden=32,
            parameters=1000,
            parameters_after=800,
            saved_as="patched",
            dtype="float32",
        ),
        patches=[
            dict(cut=[2, 4], rotation="sylvester(32)", distance=0.5, sigma=3.0, sigma_rotated=1.0)
        ],
        calibration=dict(source="passages", samples=4, seq_len=16, tokens=64, bos=True),
        evaluation={"passages": dict(windows=3, seq_len=16, tokens=48, kl_windows=3)},
        perplexity={"passages": perplexity},
        families={"passages": dict(none=30.0, hadamard=20.0, lstsq=15.0)},
        kl={"passages": dict(none=1.0, hadamard=0.5, lstsq=0.4)},
        continuations=[dict(prompt="Once", dense="a", pruned="b", patched="c")],
        figures={},
        versions=dict(linearpatch="0", torch="0", transformers="0", python="0"),
    )


def without(record, path):
    copy = json.loads(json.dumps(record))
    node = copy
    *way, last = path
    for key in way:
        node = node[key]
    del node[last]
    return copy


def test_complete(record):
    check_report(record)


# What the layout was before it was a pydantic model
KEYS = """schema command model.name model.architecture model.layers model.layers_after model.hidden
model.parameters model.parameters_after model.dtype cuts metric patch patches[].cut
patches[].rotation patches[].distance patches[].sigma patches[].sigma_rotated calibration.source
calibration.samples calibration.seq_len calibration.tokens calibration.bos evaluation.*.windows
evaluation.*.seq_len evaluation.*.tokens perplexity.*.dense perplexity.*.pruned
perplexity.*.patched families.*.* kl.*.* continuations[].prompt continuations[].dense figures.*
notes seed versions"""


def test_the_layout_has_all_keys():
    assert set(SCHEMA) == {*KEYS.split(), "model.saved_as", "evaluation.*.kl_windows"}
    assert len(DISTILLATION) == 17 and "distillation.history[].heldout" in DISTILLATION
    assert len(TASKS) == 8 and "tasks.scores.*.*.stderr" in TASKS
    assert SCHEMA["perplexity.*.dense"] == ("number", "of the teacher")
    assert SCHEMA["cuts"][0] == SCHEMA["notes"][0] == "list" and SCHEMA["versions"][0] == "dict"


@pytest.mark.parametrize(
    "path", [p.split(".") for p in SCHEMA if "*" not in p and "[]" not in p], ids=".".join
)
def test_each_missing_key_is_named(record, path):
    with pytest.raises(ValueError, match=re.escape(path[0])):
        check_report(without(record, path))


@pytest.mark.parametrize(
    "path", [["perplexity", "passages", "patched"], ["evaluation", "passages", "windows"]]
)
def test_missing_key_of_a_corpus(record, path):
    with pytest.raises(ValueError, match=path[0]):
        check_report(without(record, path))


def test_wrong_types(record):
    for key, value in (("seed", "0"), ("seed", True), ("cuts", "2:4"), ("notes", {})):
        with pytest.raises(ValueError, match=key):
            check_report(dict(record, **{key: value}))


def test_schema_table_has_every_key():
    assert all(f"`{key}`" in schema_table() for key in SCHEMA)


def test_plain_is_json(record):
    value = plain(
        dict(
            a=torch.ones(2, 2) / 3,
            b=math.nan,
            c=(1, 2),
            d=[math.inf, 1.5],
            e=None,
            f="x",
            g=torch.tensor(2.0),
        )
    )
    assert json.loads(json.dumps(value, allow_nan=False)) == dict(
        a=[[0.33333] * 2] * 2, b=None, c=[1, 2], d=[None, 1.5], e=None, f="x", g=2.0
    )


def test_gap_closed():
    assert (
        gap_closed(10, 30, 20) == 0.5
        and gap_closed(10, 30, 10) == 1
        and gap_closed(10, 30, 40) == -0.5
    )
    assert all(
        math.isnan(gap_closed(*v))
        for v in ((10, 10, 9), (10, 9, 8), (10, None, 9), (10, 30, math.inf))
    )


def test_numbers():
    assert [number(v) for v in (1, 999.999, 12345, 1e9, None, math.nan)] == [
        "1.00",
        "1,000.00",
        "12,345",
        "1.00e+09",
        "not finite",
        "not finite",
    ]


def told(record, **ppl):
    return dict(record, perplexity={"passages": dict(record["perplexity"]["passages"], **ppl)})


@pytest.mark.parametrize(
    "ppl, story, words",
    [
        (dict(), "helps", "50 % of the gap is closed"),
        (dict(patched=30.1), "little", "hardly changes"),
        (dict(patched=45.0), "harms", "makes it worse"),
        (dict(pruned=10.0), "no gap", "no cost"),
        (dict(patched=None), "not finite", "not finite"),
    ],
)
def test_headline_is_honest(record, ppl, story, words):
    r = told(record, **ppl)
    assert verdict(r) == story and words in headline(r)
    assert ("of the gap is closed" in headline(r)) == (story == "helps")


def test_headline_names_the_best(record):
    assert "lstsq, closes 75 %" in headline(record)
    record["families"]["passages"]["lstsq"] = 25.0
    assert "lstsq" not in headline(record)


def test_headline_gives_a_reason(record):
    r = told(record, patched=30.0)
    assert "little to scale" in headline(dict(r, patches=[dict(r["patches"][0], distance=0.01)]))
    assert "sizes did differ" in headline(dict(r, patches=[dict(r["patches"][0], distance=0.9)]))


def test_table(record):
    lines = table(record).splitlines()
    assert (
        len(lines) == 2 + 4
        and lines[-2].startswith("+ hadamard *")
        and len({len(l) for l in lines[3:]}) == 1
    )
    assert [r["name"] for r in rows(record)] == ["dense", "pruned", "+ hadamard", "+ lstsq"]
    assert repr(record) == table(record)


def test_cuts_text():
    assert cuts_text(dict(cuts=[[0, 2], [4, 5]])) == "layers 0 to 1, 4"


def test_page_stands_alone(record):
    html = page(record, {"magnitude": b"\x89PNG"}, saved="out/model")
    assert (
        not re.search(r"(src|href)=\"(?!data:)", html)
        and "<script" not in html
        and "http" not in html
    )
    assert "data:image/png;base64,iVBORw" in html and CAPTIONS["magnitude"] in html
    assert (
        'load_student("out/model")' in html
        and record["command"] in html
        and 'name="viewport"' in html
    )


def test_page_escapes(record):
    record["continuations"][0]["dense"] = "</div><script>alert(1)</script>"
    record["notes"] = ["<b>bold</b>"]
    html = page(record)
    assert "<script" not in html and "<b>bold" not in html and "&lt;script&gt;" in html


@pytest.mark.parametrize(
    "change",
    [
        dict(
            perplexity={},
            families={},
            kl={},
            evaluation={},
            figures=dict(
                magnitude=dict(raw=dict(by_layer=[1.0, 1.0, 1.0, 2.0, 3.0])),
                ratios=dict(cuts=[dict(cut=[2, 4], raw=dict(sigma=1.0), rotated=dict(sigma=2.0))]),
            ),
        ),
        dict(continuations=[]),
        dict(cuts=[[0, 1], [5, 6]]),
        dict(patch="none", patches=[]),
    ],
)
def test_page_of_other_runs(record, change):
    assert "</html>" in page(dict(record, **change))


def test_save_and_load(record, tmp_path):
    saved = save_report(record, tmp_path)
    assert saved == tmp_path / "report.html" and Report.load(tmp_path) == record == Report.load(
        tmp_path / "report.json"
    )


def test_nothing_is_written_of_a_broken_record(record, tmp_path):
    del record["seed"]
    with pytest.raises(ValueError, match="seed"):
        save_report(record, tmp_path)
    assert not list(tmp_path.iterdir())


# Files that were not written by this version, or are damaged


def test_the_first_layout_is_read(record, tmp_path):
    "It did not say what was saved, nor on how many windows KL was measured."
    old = json.loads(json.dumps(record | dict(schema=1)))
    del old["model"]["saved_as"], old["evaluation"]["passages"]["kl_windows"]
    old["evaluation"]["passages"].update(windows=93, seq_len=1024)
    (tmp_path / "report.json").write_text(json.dumps(old))
    new = Report.load(tmp_path)
    assert new["schema"] == 2 and new["model"]["saved_as"] == "patched"
    assert new["evaluation"]["passages"]["kl_windows"] == 64
    assert new["model"]["parameters_after"] == old["model"]["parameters_after"]
    folded = old | dict(notes=["The saved model is folded, plain transformers load it."])
    assert upgrade(folded)["model"]["saved_as"] == "folded"
    assert upgrade(old | dict(patch="none"))["model"]["saved_as"] == "plain"
    assert upgrade(old | dict(perplexity={}))["model"]["saved_as"] is None
    assert old["schema"] == 1 and "saved_as" not in old["model"], "the old record is left alone"


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "is no valid JSON"),
        ("[1]", "a report is an object with keys"),
        ('{"schema": 3}', "has layout 3.*install a newer linearpatch"),
        ('{"schema": 0}', "has layout 0"),
        ('{"schema": "1"}', "schema of the report should be of type int"),
        ("{}", "the report has no schema"),
        ('{"schema": 1, "model": 3}', "the report has no command"),
    ],
)
def test_one_line_for_a_damaged_file(tmp_path, text, said):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=said) as e:
        Report.load(tmp_path)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_distilled_runs_say_so_everywhere(record):
    point = dict(step=1, loss=0.5, heldout=0.5)
    record["distillation"] = dict(
        mode="online",
        source="passages",
        windows=4,
        heldout=1,
        seq_len=16,
        top_k=None,
        settings={},
        total=2,
        steps=2,
        best=1,
        tokens=64,
        seconds=1.0,
        cache_bytes=None,
        history=[point],
    )
    with pytest.raises(ValueError, match=r"perplexity\.\*\.distilled"):
        check_report(record)
    record["perplexity"]["passages"]["distilled"] = 12.0
    check_report(record)
    point["step"] = "1"
    with pytest.raises(ValueError, match=r"distillation\.history\[\]\.step .*type int.*'1'"):
        check_report(record)


# The student that was saved


@pytest.fixture(scope="module")
def playground():
    return load_playground()


@pytest.fixture(scope="module")
def students(playground):
    "One cut, five students: with a module, in the weights, folded, without a patch."
    model, tokenizer = playground
    windows = load_windows("passages", tokenizer, seq_len=128, samples=16)
    cut = Cut(4, 7)
    stats = collect(model, windows, [cut], moments=[cut], batch_size=16)
    made = {"none": prune(model, cut, share=True)}
    for family in ("hadamard", "mlp", "procrustes"):
        made[family] = prune(model, cut, fit_patch(stats, cut, family), share=True)
    made["folded"] = fold(made["procrustes"], share=True)
    return made


def stored(folder):
    "Numbers in the saved weights."
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as f:
        return sum(math.prod(f.get_slice(k).get_shape()) for k in f.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    "name, form", [("none", "plain"), ("hadamard", "patched"), ("mlp", "folded"), ("folded",) * 2]
)
def test_the_size_is_that_of_the_saved_model(playground, students, tmp_path, name, form):
    model, tokenizer = playground
    size = describe_model(model, "playground", [Cut(4, 7)], students[name])
    save_student(students[name], tmp_path / "model", tokenizer)
    assert stored(tmp_path / "model") == size["parameters_after"] and size["saved_as"] == form
    if form != "patched":
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert sum(p.numel() for p in again.parameters()) == size["parameters_after"]


def test_sizes_of_the_playground(playground, students):
    "A fold of a rotation unties the head, which is told before and after."
    model, _ = playground
    size = lambda s: describe_model(model, "playground", [Cut(4, 7)], s)["parameters_after"]
    assert size(students["procrustes"]) == 615_616 and size(students["folded"]) == 742_592
    assert parameters_if_folded(students["procrustes"]) == 742_592
    assert size(students["mlp"]) == size(students["none"]) == size(None) == 611_520
    assert describe_model(model, "playground", [Cut(4, 7)])["saved_as"] is None


def test_a_fold_that_outgrows_the_teacher(playground, students):
    model, _ = playground
    note = fold_note(model, students["procrustes"])
    assert "615,616 parameters become 742,592; the intact model has 771,648." in note
    one = Cut(4, 5)
    large = fold_note(model, prune(model, one, random_patch(one, 64), share=True))
    assert "more than the 771,648 of the intact model. Keep the patch" in large
    assert fold_note(model, students["mlp"]) == fold_note(model, students["none"]) == ""


@pytest.mark.parametrize(
    "patch, folds, form, count",
    [
        ("hadamard", False, "patched", 615_616),
        ("mlp", False, "folded", 611_520),
        ("procrustes", True, "folded", 742_592),
    ],
)
def test_a_run_reports_what_it_saved(playground, tmp_path, patch, folds, form, count):
    settings = dict(calibration="passages", eval=("passages",), samples=16, seq_len=128)
    report = run_pipeline(
        *playground,
        cuts=("4:7",),
        patch=patch,
        fold=folds,
        batch_size=16,
        out=tmp_path / "out",
        **settings,
    )
    size = Report.load(tmp_path / "out")["model"]
    assert size == report["model"] and size["saved_as"] == form
    assert size["parameters_after"] == count == stored(tmp_path / "out" / "model")
    html = flat((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert f"{count:,}." in html and ("load_student(" in html) == (form == "patched")
    assert any("615,616 parameters become 742,592" in note for note in report["notes"]) == folds


# What the page says of it


def saved_as(record, form, **more):
    return dict(record, model=dict(record["model"], saved_as=form), **more)


def flat(html):
    return " ".join(html.split())


def test_page_of_a_patched_student(record):
    html = flat(page(record, saved="out/model"))
    assert "the teal block is the patch" in html and html.count('class="patch"') == 1
    assert "A plain <code>from_pretrained</code> would leave the patch out" in html
    assert "4 layers and 1 matrix" in html and "One matrix of 32 x 32 brings" in html


def test_page_of_a_folded_student(record):
    families = {"passages": dict(none=30.0, hadamard=20.0, folded=20.5)}
    html = flat(page(saved_as(record, "folded", families=families), saved="out/model"))
    assert "no module is left for it" in html and 'class="patch"' not in html
    assert "would leave the patch out" not in html and "load_student" not in html
    assert 'AutoModelForCausalLM.from_pretrained("out/model")' in html
    assert "4 layers and 1 matrix" in html and "as saved: no patch module is left" in html
    assert "Folded into the weights, as it is saved, it has 20.50." in html


def test_page_of_an_mlp_student(record):
    families = {"passages": dict(none=30.0, mlp=20.0)}
    html = flat(page(saved_as(record, "folded", patch="mlp", families=families), saved="out/model"))
    assert "the mlp patch is multiplied into the weights" in html and 'class="patch"' not in html
    assert "load_student" not in html and "4 layers and the patch in their weights" in html
    assert "The patch, multiplied into the weights before the cut, brings it back" in html


def test_page_without_a_patch(record):
    families = {"passages": dict(none=30.0)}
    html = flat(
        page(saved_as(record, "plain", patch="none", patches=[], families=families), saved="out")
    )
    assert "It has no patch, so a plain load gives the whole model" in html
    assert 'class="patch"' not in html and "teal block" not in html


def test_kl_is_told_with_its_tokens(record):
    assert kl_note(record) == "KL is over all of these tokens" and kl_note(record) in page(record)
    evaluation = dict(windows=163, seq_len=2048, tokens=333_824, kl_windows=32)
    long = dict(record, evaluation={"wikitext2": evaluation})
    assert kl_note(long) == "KL is over the first 65,536 tokens of a corpus"
    assert kl_note(long) in page(long)


# Tables


def test_aligned_and_markdown():
    body = [["", "a"], ["x|y", "1.00"]]
    assert aligned(body) == "        a\nx|y  1.00"
    assert aligned(body, rule=True).splitlines()[1] == "-" * 9
    assert aligned([["a", ""], ["b", "cc"]]).splitlines()[0] == "a", "no spaces at the end"
    assert markdown(body) == "|  | a |\n| --- | ---: |\n| x&#124;y | 1.00 |"
    assert percent(-0.001) == "0 %" and percent(None) == "" == percent(math.nan)
