"Strip the library, export the notebooks again, and find the same library: nothing stale, nothing edited by hand."
import os, re, shutil, subprocess, sys
import pytest
from repo import default_exp, lib, notebooks, root


def python_files(folder): return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8")
                                  for p in folder.rglob("*.py")}


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    "The library as the notebooks export it into an empty folder."
    copy = tmp_path_factory.mktemp("again") / "linearpatch"
    copy.mkdir()
    skip = shutil.ignore_patterns("_*", ".*")
    shutil.copytree(root / "nbs", copy / "nbs", ignore=skip)
    shutil.copy(root / "settings.ini", copy)
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "PYTHONPATH")}
    subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()"],
                   cwd=copy, env=env, check=True)
    return python_files(copy / "linearpatch")


def test_same_modules(again):
    here = python_files(lib)
    assert sorted(here) == sorted(again), "a module without a notebook, or a notebook that was not exported"


def test_same_code(again):
    here = python_files(lib)
    assert [n for n in again if here.get(n) != again[n]] == [], "run nbdev_export"


def test_every_module_has_its_notebook():
    homes = {f"{m}.py" for m in map(default_exp, notebooks()) if m}
    assert {p.name for p in lib.glob("*.py")} - {"_modidx.py"} == homes


def test_modules_import_only_earlier_ones():
    "Reading order is import order, but for one step: the pass of `mismatch` sums rotated activations too."
    order = {default_exp(p): i for i, p in enumerate(notebooks()) if default_exp(p) and p.name[0].isdigit()}
    ahead = [(module, other) for module, place in order.items()
             for other in re.findall(r"^\s*from (?:linearpatch)?\.(\w+) import", (lib / f"{module}.py").read_text("utf-8"), re.MULTILINE)
             if order[other] > place]
    assert set(ahead) <= {("mismatch", "hadamard")}
