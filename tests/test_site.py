"The site's configuration: one file at the top, every page in the sidebar, nothing there that does not exist."

import os
import re
import shutil
import subprocess
import sys

import yaml
from repo import modules, name, nbs, notebooks, room, root, settings


def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def pages(contents):
    for item in contents:
        if isinstance(item, str):
            yield item
        elif "contents" in item:
            yield from pages(item["contents"])
        else:
            yield item["href"]


def test_sidebar_names_every_page():
    listed = list(pages(load(nbs / "sidebar.yml")["website"]["sidebar"]["contents"]))
    there = [name(p) for p in notebooks()] + [
        name(p) for p in nbs.rglob("*.qmd") if "_proc" not in p.parts and p.stem != "404"
    ]
    assert sorted(listed) == sorted(there)


def test_sidebar_sections():
    sections = load(nbs / "sidebar.yml")["website"]["sidebar"]["contents"]
    assert [s["section"] for s in sections] == [
        "Start",
        "The method, step by step",
        "Tutorials",
        "The workshop",
        "Reference",
    ]
    start, chapters, workshop = (list(pages(sections[i]["contents"])) for i in (0, 1, 3))
    workshop += [page for page in start if page.startswith("workshop/")]
    assert chapters == [name(p) for p in notebooks() if p.parent.name == "method"]
    assert sorted(workshop) == [name(p) for p in notebooks() if p.parent.name == "workshop"]


def test_nbs_quarto_yml_only_points():
    assert load(nbs / "_quarto.yml") == {
        "metadata-files": ["../_quarto.yml", "nbdev.yml", "sidebar.yml"]
    }


def test_rendering_never_runs_a_notebook():
    top = load(root / "_quarto.yml")
    assert top["execute"] == {"enabled": False} and top["project"]["type"] == "website"
    assert (nbs / top["format"]["html"]["css"]).exists()


def test_nbdev_yml_is_made_from_settings():
    cfg, site = settings(), load(nbs / "nbdev.yml")
    assert site["project"]["output-dir"] == cfg["doc_path"]
    assert site["website"] == {
        "title": cfg["title"],
        "site-url": cfg["doc_host"] + cfg["doc_baseurl"],
        "description": cfg["description"],
        "repo-branch": cfg["branch"],
        "repo-url": cfg["git_url"],
    }


def test_contributing_shows_the_rooms():
    text = (nbs / "contributing.qmd").read_text(encoding="utf-8")
    rooms = set(re.findall(r"^\| \[`([\w.]+)`\]", text, re.MULTILINE))
    assert rooms == {*map(room, modules())}, (
        "the table of rooms in nbs/contributing.qmd is not up to date"
    )


def test_quarto_version_is_pinned():
    workflow = (root / ".github/workflows/site.yaml").read_text(encoding="utf-8")
    assert re.search(r'version: "1\.10\.\d+"', workflow)


def test_nbdev_makes_every_page(tmp_path):
    "What the site is rendered from: nbdev runs the imports and the exported cells, and fills in the documentation."
    copy = tmp_path / "linearpatch"
    shutil.copytree(nbs, copy / "nbs", ignore=shutil.ignore_patterns(".*", "_proc"))
    for file in ("settings.ini", "_quarto.yml"):
        shutil.copy(root / file, copy)
    done = subprocess.run(
        [sys.executable, "-c", "from nbdev.serve import proc_nbs; proc_nbs(n_workers=2)"],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    made = copy / "_proc"
    assert sorted(name(p) for p in notebooks()) == sorted(
        p.relative_to(made).as_posix() for p in made.rglob("*.ipynb")
    )
    for file in load(nbs / "_quarto.yml")["metadata-files"]:
        assert (made / file).exists(), f"{file} is out of reach there"
