"What the tests of the repository itself share: where the notebooks and the modules are, and how they are read."
import ast, json
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
nbs, lib = root / "nbs", root / "linearpatch"


def notebooks():
    "Every notebook of the project, in reading order."
    return [p for p in sorted(nbs.rglob("*.ipynb"))
            if not any(part.startswith(("_", ".")) for part in p.relative_to(root).parts)]


def name(path): return path.relative_to(nbs).as_posix()


def load(path): return json.loads(path.read_text(encoding="utf-8"))


def source(cell): return "".join(cell["source"])


def marks(cell):
    "The `#| ...` directives of a cell."
    return [line[2:].strip() for line in source(cell).splitlines() if line.startswith("#|")]


def exported(cell):
    return cell["cell_type"] == "code" and any(m.split()[:1] in (["export"], ["exporti"], ["exports"]) for m in marks(cell))


def default_exp(path):
    "The module that a notebook exports to, or None."
    found = [m.split()[1] for c in load(path)["cells"] for m in marks(c) if m.startswith("default_exp")]
    assert len(found) <= 1, f"{name(path)} has {len(found)} default_exp cells"
    return found[0] if found else None


def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(root / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def modules():
    "The library's public modules, by name."
    return [p for p in sorted(lib.glob("*.py")) if not p.name.startswith("_")]


def public(path):
    "The `__all__` of a module, read without importing it."
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{path.name} has no __all__")
