"What is installed: one truth for version and requirements, the bundled data, a quick import, documented functions."

import ast
import importlib
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
import warnings
import zipfile

import pytest
from repo import lib, load, modules, nbs, public, room, root, settings, source

tools = {
    "nbdev",
    "execnb",
    "fastcore",
    "ghapi",
    "fastgit",
    "jupyterlab",
    "ipykernel",
    "nbformat",
    "nbconvert",
    "nbclient",
    "pytest",
    "pytest-xdist",
    "ipywidgets",
    "ipython",
    "notebook",
    "jupyter",
    "build",
}


def names(requirements):
    return {re.split(r"[<>=!~\[; ]", r)[0].lower() for r in requirements}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel that pip would build, made from a copy of the sources."
    copy, out = tmp_path_factory.mktemp("src") / "linearpatch", tmp_path_factory.mktemp("wheel")
    copy.mkdir()
    for file in (
        "settings.ini",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "MANIFEST.in",
        "CONTRIBUTING.md",
    ):
        shutil.copy(root / file, copy)
    shutil.copytree(lib, copy / "linearpatch", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [
            sys.executable,
            "-c",
            f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})",
        ],
        cwd=copy,
        check=True,
        capture_output=True,
    )
    return zipfile.ZipFile(next(out.glob("*.whl")))


@pytest.fixture(scope="module")
def metadata(wheel):
    from email import message_from_string

    return message_from_string(
        wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    )


def test_one_version(metadata):
    import linearpatch

    assert linearpatch.__version__ == settings()["version"] == metadata["Version"]
    cells = "\n".join(map(source, load(nbs / "reference.ipynb")["cells"]))
    assert f'__version__ = "{settings()["version"]}"' in cells, (
        "give nbs/reference.ipynb the new version too"
    )


def test_one_python(metadata):
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (
        project["requires-python"] == metadata["Requires-Python"] == ">=" + settings()["min_python"]
    )
    assert project["name"] == metadata["Name"] == settings()["lib_name"]


def test_one_list_of_requirements(metadata):
    cfg = settings()
    found = metadata.get_all("Requires-Dist")
    runtime = names(r for r in found if "extra ==" not in r)
    assert runtime == names(cfg["requirements"].split())
    extra = lambda name: names(r for r in found if re.search(rf"extra == .{name}.", r))
    assert extra("eval") == names(cfg["eval_requirements"].split())
    assert extra("serve") == names(cfg["serve_requirements"].split())
    assert extra("adapters") == names(cfg["adapters_requirements"].split())
    assert extra("gguf") == names(cfg["gguf_requirements"].split())
    assert extra("dev") == extra("eval") | extra("gguf") | extra("serve") | extra(
        "adapters"
    ) | names(cfg["dev_requirements"].split())
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"version", "dependencies", "optional-dependencies"} <= set(project["dynamic"]), (
        "settings.ini is the one place"
    )


def test_users_need_no_development_tool(metadata):
    runtime = names(r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r)
    assert not runtime & tools
    imported = set()
    for path in lib.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {a.name.split(".")[0] for a in node.names}
            if isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    assert not imported & {t.lower() for t in tools} - {"build"}
    optional = {"lm_eval", "IPython", "gguf"}
    unknown = {m for m in imported if m not in sys.stdlib_module_names} - {
        r.replace("-", "_") for r in runtime
    }
    come_along = {"linearpatch", "markupsafe"}  # the last one with jinja2
    assert unknown <= optional | come_along, f"imported, but not required: {unknown}"


def test_the_wheel_holds_the_bundled_data(wheel):
    packed = {n for n in wheel.namelist() if n.startswith("linearpatch/")}
    here = {
        p.relative_to(root).as_posix()
        for folder in ("playground", "passages", "tasks", "templates", "shipped")
        for p in (lib / folder).rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert here <= packed and "linearpatch/playground/model.safetensors" in packed
    assert any(n.startswith("linearpatch/passages/heldout/") for n in packed)
    assert {"linearpatch/templates/report.html.j2", "linearpatch/templates/report.css"} <= packed
    assert {"linearpatch/tasks/offline.yaml", "linearpatch/tasks/pairs_case.jsonl"} <= packed
    assert {p.relative_to(root).as_posix() for p in lib.rglob("*.py")} <= packed
    assert {f"linearpatch/recipes/{p.name}" for p in (lib / "recipes").glob("*.toml")} <= packed


def test_licence(wheel, metadata):
    assert metadata["License-Expression"] == "Apache-2.0" or metadata["License"] == "Apache-2.0"
    assert any(n.endswith("LICENSE") for n in wheel.namelist())


def test_the_command_is_installed(wheel):
    entry = wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()
    assert re.search(r"linearpatch ?= ?linearpatch\.workshop\.cli:main", entry)
    from linearpatch.workshop.cli import main

    assert callable(main)


def test_import_is_quick():
    code = "import sys, linearpatch; print(sorted({'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_the_front_door():
    "Each name that the package offers is public in the module that the table gives, and means that."
    import linearpatch

    offered = {room(p): set(public(p)) for p in modules()}
    assert {*linearpatch._names, *linearpatch._plain} == set(offered), (
        "every module has a line in the table of nbs/reference.ipynb"
    )
    for module, names in linearpatch._names.items():
        assert set(names.split()) <= offered[module]
        for n in names.split():
            assert getattr(linearpatch, n) is getattr(
                importlib.import_module(f"linearpatch.{module}"), n
            )
    assert not set(linearpatch.__all__) & {p.stem for p in modules()}, (
        "a module's name means the module"
    )


def test_a_type_checker_reads_the_same_names():
    tree = ast.parse((lib / "__init__.py").read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If))
    import linearpatch

    found = {
        node.module.removeprefix("linearpatch.").lstrip("."): {a.asname for a in node.names}
        for node in block.body
    }
    assert found == {room: set(names.split()) for room, names in linearpatch._names.items()}


def test_one_home_a_name():
    homes = {}
    for path in modules():
        for n in public(path):
            homes.setdefault(n, []).append(path.stem)
    assert {n: where for n, where in homes.items() if len(where) > 1} == {}, (
        "one name, exported by two modules"
    )


def test_an_unknown_name_is_an_attribute_error():
    import linearpatch

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        linearpatch.nothing
    assert "collect" in dir(linearpatch)


def functions(path):
    "(name, node) of each public function that a module exports, and of each plain public method of its classes."
    offered = set(public(path))
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name in offered:
            yield node.name, node
        if isinstance(node, ast.ClassDef) and node.name in offered:
            for sub in node.body:
                if (
                    isinstance(sub, ast.FunctionDef)
                    and not sub.name.startswith("_")
                    and not sub.decorator_list
                ):
                    yield f"{node.name}.{sub.name}", sub


def comments(path):
    "{line number: comment} of a module."
    with tokenize.open(path) as file:
        return {
            t.start[0]: t.string
            for t in tokenize.generate_tokens(file.readline)
            if t.type == tokenize.COMMENT
        }


every_module = pytest.mark.parametrize("path", modules(), ids=room)


@every_module
def test_size(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 450, f"{room(path)} has {lines} lines: split its notebook"


@every_module
def test_compiles_without_a_warning(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile(path.read_text(encoding="utf-8"), path.name, "exec")


@every_module
def test_docstrings(path):
    missing = [n for n, node in functions(path) if not ast.get_docstring(node)]
    classes = [
        node.name
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
        and node.name in public(path)
        and not ast.get_docstring(node)
    ]
    assert not missing + classes, f"no docstring: {missing + classes}"


@every_module
def test_docments(path):
    "Each parameter of each public function stands on a line of its own, with a comment behind it that says what it is."
    said, missing = comments(path), []
    for n, node in functions(path):
        if any("command" in ast.unparse(d) for d in node.decorator_list):
            continue  # typer's help says it
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for a in arguments:
            if a.arg not in ("self", "cls") and "." not in n and a.end_lineno not in said:
                missing.append(f"{n}({a.arg})")
    assert not missing, f"parameters without a comment: {missing}"
