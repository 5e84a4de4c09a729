"The record of a run and its page: the schema holds, the words fit the numbers, the page stands alone."
import json, math, re
import pytest, torch
from linearpatch.report import (CAPTIONS, SCHEMA, Report, check_report, cuts_text, gap_closed, headline, number, page, plain, rows, save_report,
                                schema_table, table, verdict)


@pytest.fixture
def record():
    perplexity = dict(dense=10., pruned=30., patched=20.)
    return Report(
        schema=1, command="linearpatch run m --remove 2", cuts=[[2, 4]], metric="cosine", patch="hadamard", seed=0, notes=[],
        model=dict(name="some/m", architecture="LlamaForCausalLM", layers=6, layers_after=4, hidden=32, parameters=1000, parameters_after=800, dtype="float32"),
        patches=[dict(cut=[2, 4], rotation="sylvester(32)", distance=0.5, sigma=3., sigma_rotated=1.)],
        calibration=dict(source="passages", samples=4, seq_len=16, tokens=64, bos=True), evaluation={"passages": dict(windows=3, seq_len=16, tokens=48)},
        perplexity={"passages": perplexity}, families={"passages": dict(none=30., hadamard=20., lstsq=15.)},
        kl={"passages": dict(none=1., hadamard=.5, lstsq=.4)}, continuations=[dict(prompt="Once", dense="a", pruned="b", patched="c")],
        figures={}, versions=dict(linearpatch="0", torch="0", transformers="0", python="0"))


def without(record, path):
    copy = json.loads(json.dumps(record))
    node = copy
    *way, last = path
    for key in way: node = node[key]
    del node[last]
    return copy


def test_complete(record): check_report(record)


@pytest.mark.parametrize("path", [p.split(".") for p in SCHEMA if "*" not in p and "[]" not in p], ids=".".join)
def test_each_missing_key_is_named(record, path):
    with pytest.raises(ValueError, match=re.escape(path[0])): check_report(without(record, path))


@pytest.mark.parametrize("path", [["perplexity", "passages", "patched"], ["evaluation", "passages", "windows"]])
def test_missing_key_of_a_corpus(record, path):
    with pytest.raises(ValueError, match=path[0]): check_report(without(record, path))


def test_wrong_types(record):
    for key, value in (("seed", "0"), ("seed", True), ("cuts", "2:4"), ("notes", {})):
        with pytest.raises(ValueError, match=key): check_report(dict(record, **{key: value}))


def test_schema_table_has_every_key(): assert all(f"`{key}`" in schema_table() for key in SCHEMA)


def test_plain_is_json(record):
    value = plain(dict(a=torch.ones(2, 2) / 3, b=math.nan, c=(1, 2), d=[math.inf, 1.5], e=None, f="x", g=torch.tensor(2.0)))
    assert json.loads(json.dumps(value, allow_nan=False)) == dict(a=[[.33333] * 2] * 2, b=None, c=[1, 2], d=[None, 1.5], e=None, f="x", g=2.0)


def test_gap_closed():
    assert gap_closed(10, 30, 20) == .5 and gap_closed(10, 30, 10) == 1 and gap_closed(10, 30, 40) == -.5
    assert all(math.isnan(gap_closed(*v)) for v in ((10, 10, 9), (10, 9, 8), (10, None, 9), (10, 30, math.inf)))


def test_numbers(): assert [number(v) for v in (1, 999.999, 12345, 1e9, None, math.nan)] == ["1.00", "1,000.00", "12,345", "1.00e+09", "not finite", "not finite"]


def told(record, **ppl): return dict(record, perplexity={"passages": dict(record["perplexity"]["passages"], **ppl)})


@pytest.mark.parametrize("ppl, story, words", [
    (dict(), "helps", "50 % of the gap is closed"), (dict(patched=30.1), "little", "hardly changes"), (dict(patched=45.), "harms", "makes it worse"),
    (dict(pruned=10.), "no gap", "no cost"), (dict(patched=None), "not finite", "not finite")])
def test_headline_is_honest(record, ppl, story, words):
    r = told(record, **ppl)
    assert verdict(r) == story and words in headline(r)
    assert ("of the gap is closed" in headline(r)) == (story == "helps")


def test_headline_names_the_best(record):
    assert "lstsq, closes 75 %" in headline(record)
    record["families"]["passages"]["lstsq"] = 25.
    assert "lstsq" not in headline(record)


def test_headline_gives_a_reason(record):
    r = told(record, patched=30.)
    assert "little to scale" in headline(dict(r, patches=[dict(r["patches"][0], distance=.01)]))
    assert "sizes did differ" in headline(dict(r, patches=[dict(r["patches"][0], distance=.9)]))


def test_table(record):
    lines = table(record).splitlines()
    assert len(lines) == 2 + 4 and lines[-2].startswith("+ hadamard *") and len({len(l) for l in lines[3:]}) == 1
    assert [r["name"] for r in rows(record)] == ["dense", "pruned", "+ hadamard", "+ lstsq"]
    assert repr(record) == table(record)


def test_cuts_text(): assert cuts_text(dict(cuts=[[0, 2], [4, 5]])) == "layers 0 to 1, 4"


def test_page_stands_alone(record):
    html = page(record, {"magnitude": b"\x89PNG"}, saved="out/model")
    assert not re.search(r"(src|href)=\"(?!data:)", html) and "<script" not in html and "http" not in html
    assert "data:image/png;base64,iVBORw" in html and CAPTIONS["magnitude"] in html
    assert 'load_student("out/model")' in html and record["command"] in html and 'name="viewport"' in html


def test_page_escapes(record):
    record["continuations"][0]["dense"] = "</div><script>alert(1)</script>"
    record["notes"] = ["<b>bold</b>"]
    html = page(record)
    assert "<script" not in html and "<b>bold" not in html and "&lt;script&gt;" in html


@pytest.mark.parametrize("change", [dict(perplexity={}, families={}, kl={}, evaluation={}, figures=dict(
    magnitude=dict(raw=dict(by_layer=[1., 1., 1., 2., 3.])), ratios=dict(cuts=[dict(cut=[2, 4], raw=dict(sigma=1.), rotated=dict(sigma=2.))]))),
    dict(continuations=[]), dict(cuts=[[0, 1], [5, 6]]), dict(patch="none", patches=[])])
def test_page_of_other_runs(record, change): assert "</html>" in page(dict(record, **change))


def test_save_and_load(record, tmp_path):
    saved = save_report(record, tmp_path)
    assert saved == tmp_path / "report.html" and Report.load(tmp_path) == record == Report.load(tmp_path / "report.json")


def test_nothing_is_written_of_a_broken_record(record, tmp_path):
    del record["seed"]
    with pytest.raises(ValueError, match="seed"): save_report(record, tmp_path)
    assert not list(tmp_path.iterdir())
