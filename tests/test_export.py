"Strip the library, export the notebooks again, and find the same library: nothing stale, nothing edited by hand."

import os
import re
import shutil
import subprocess
import sys

import pytest
from repo import default_exp, imports, lib, modules, notebooks, room, root, wings

SHIPPED = lib / "shipped"  # files that are copied into a student's folder: no notebook exports them


def python_files(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8")
        for p in folder.rglob("*.py")
        if p.relative_to(folder).parts[0] != SHIPPED.name
    }


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    "The library as the notebooks export it into an empty folder."
    copy = tmp_path_factory.mktemp("again") / "linearpatch"
    copy.mkdir()
    skip = shutil.ignore_patterns("_*", ".*")
    shutil.copytree(root / "nbs", copy / "nbs", ignore=skip)
    shutil.copy(root / "settings.ini", copy)
    shutil.copytree(SHIPPED, copy / "linearpatch" / SHIPPED.name)  # nbdev's index names it
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "PYTHONPATH")}
    subprocess.run(
        [
            sys.executable,
            "-c",
            "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()",
        ],
        cwd=copy,
        env=env,
        check=True,
    )
    return python_files(copy / "linearpatch")


def test_same_modules(again):
    here = python_files(lib)
    assert sorted(here) == sorted(again), (
        "a module without a notebook, or a notebook that was not exported"
    )


def test_same_code(again):
    here = python_files(lib)
    assert [n for n in again if here.get(n) != again[n]] == [], "run nbdev_export"


def test_every_module_has_its_notebook():
    homes = {m for m in map(default_exp, notebooks()) if m}
    assert {*map(room, modules()), "__init__"} == homes
    assert [p.name for p in lib.glob("*.py") if p.name not in ("__init__.py", "_modidx.py")] == []


def test_a_module_lies_where_its_notebook_does():
    for path in notebooks():
        if (module := default_exp(path)) and path.parent.name in wings:
            stem = re.sub(r"^\d\d_", "", path.stem)
            assert module == f"{path.parent.name}.{stem}", f"{path.name} exports to {module}"


GROUND = {
    "accumulators",
    "anatomy",
    "architectures",
    "cuts",
    "files",
    "forward",
    "gguf",
    "places",
    "prefix",
    "removal",
    "rewriting",
    "streaming",
    "texts",
    "training_state",
}


def test_lessons_import_only_earlier_lessons_and_the_ground_floor():
    "Reading order is import order, but for one step: the pass of `mismatch` sums rotated activations too."
    lessons = [p for p in notebooks() if p.parent.name == "method"]
    order = {default_exp(p): i for i, p in enumerate(lessons)}
    found = {(default_exp(p), other) for p in lessons for other in imports(module_of(p))}
    ahead = {(a, b) for a, b in found if b in order and order[b] > order[a]}
    assert ahead <= {("method.mismatch", "method.hadamard")}
    outside = {b for _, b in found if b not in order}
    ground = {f"workshop.{name}" for name in GROUND} | {"shipped.modeling_linearpatch"}
    assert outside <= ground, "a lesson needs the upper floor"


def test_what_is_shipped_stands_alone():
    "A file that travels with a student may need no other file of this library."
    files = [p for p in SHIPPED.glob("*.py") if p.name != "__init__.py"]
    assert [p.name for p in files] == ["modeling_linearpatch.py"]
    for p in files:
        assert not re.search(r"^\s*(from|import) (\.|linearpatch)", p.read_text(), re.MULTILINE)


def module_of(notebook):
    return lib / (default_exp(notebook).replace(".", "/") + ".py")


def test_no_circles():
    "Taking away what imports nothing that is left, again and again, takes everything away."
    left = {room(p): imports(p) & {*map(room, modules())} for p in modules()}
    while free := [name for name, needs in left.items() if not needs & left.keys() - {name}]:
        for name in free:
            del left[name]
    assert not left, f"these import each other: {left}"
