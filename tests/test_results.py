"The page of results shows what its records hold, and each record says how it is made again."

import json
from pathlib import Path

import pytest
from repo import load

NBS = Path(__file__).resolve().parent.parent / "nbs"
RECORDS = sorted((NBS / "records").glob("*/*.json"))  # roads.json: see test_roads.py


def test_there_are_records():
    assert NBS / "records/smollm2/fits.json" in RECORDS


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_a_record_can_be_made_again(path):
    record = json.loads(path.read_text())
    assert record["command"].startswith("python tools/measure_real.py smollm2")
    assert {"torch", "transformers", "linearpatch"} <= set(record["versions"])
    assert record["seconds"] > 0 and record["machine"] and record["commit"]
    assert {"calibration", "wikitext2"} <= set(record["protocol"]) and record["result"]
    assert path.stat().st_size < 200_000


def printed(path):
    "All that the cells of a page show, as one text."
    texts = []
    for cell in load(path)["cells"]:
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            text = data.get("text/markdown") or data.get("text/plain") or out.get("text", "")
            texts.append("".join(text))
    return "\n".join(texts)


def test_the_page_shows_what_the_record_holds():
    fits = json.loads((NBS / "records/smollm2/fits.json").read_text())["result"]
    page = printed(NBS / "results.ipynb")
    assert len(fits) >= 3
    for cut, row in fits.items():
        lines = [x for x in page.splitlines() if x.startswith(f"| [{cut.replace(':', ', ')})")]
        assert len(lines) >= 5, cut
        shown = " ".join(lines)
        for family in ("dense", "none", "hadamard", "unweighted", "joint", "joint-refit"):
            for scores in row["scores"].values():
                assert f" {scores[family][0]:,.1f} " in shown, (cut, family)
        assert f" {row['auto']} " in shown


def test_what_the_guard_took_is_no_worse_than_no_patch():
    fits = json.loads((NBS / "records/smollm2/fits.json").read_text())["result"]
    for cut, row in fits.items():
        for scores in row["scores"].values():
            best = min(v[0] for k, v in scores.items() if k in row["guard"])
            assert scores[row["auto"]][0] < scores["none"][0], cut
            assert scores[row["auto"]][0] <= 1.05 * best, cut
