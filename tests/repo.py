"What the tests of the repository itself share: where the notebooks and the modules are, and how they are read."

import ast
import json
import re
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
nbs, lib = root / "nbs", root / "linearpatch"
wings = ("method", "workshop")


def notebooks():
    "Every notebook of the project, in reading order."
    return [
        p
        for p in sorted(nbs.rglob("*.ipynb"))
        if not any(part.startswith(("_", ".")) for part in p.relative_to(root).parts)
    ]


def name(path):
    return path.relative_to(nbs).as_posix()


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def marks(cell):
    "The `#| ...` directives of a cell."
    return [line[2:].strip() for line in source(cell).splitlines() if line.startswith("#|")]


def exported(cell):
    return cell["cell_type"] == "code" and any(
        m.split()[:1] in (["export"], ["exporti"], ["exports"]) for m in marks(cell)
    )


def default_exp(path):
    "The module that a notebook exports to, or None."
    found = [
        m.split()[1] for c in load(path)["cells"] for m in marks(c) if m.startswith("default_exp")
    ]
    assert len(found) <= 1, f"{name(path)} has {len(found)} default_exp cells"
    return found[0] if found else None


def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(root / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def modules():
    "The library's modules, wing by wing."
    return [p for w in wings for p in sorted((lib / w).glob("*.py")) if not p.name.startswith("_")]


def room(path):
    "A module's name inside the package, such as method.models."
    return ".".join(path.relative_to(lib).with_suffix("").parts)


def imports(path):
    "The rooms that a module imports, at the top or inside a function."
    text, wing = path.read_text(encoding="utf-8"), path.parent.name
    found = re.findall(
        r"^\s*from (?:linearpatch|(\.{1,2}))\.?((?:\w+\.)?\w+) import", text, re.MULTILINE
    )
    return {
        f"{wing}.{name}" if dots == "." else name for dots, name in found if name != "linearpatch"
    }


def public(path):
    "The `__all__` of a module, read without importing it."
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{path.name} has no __all__")
