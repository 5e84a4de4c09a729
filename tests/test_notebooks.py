"Every notebook is a page that can be published as it lies here."

import ast
import itertools
import re

import pytest
from repo import default_exp, exported, load, marks, name, notebooks, source

pages = pytest.mark.parametrize("path", notebooks(), ids=name)
elsewhere = re.compile(
    r"(?<![\w.])/(?:home|tmp|root|work|workspace|mnt|Users|private|var/folders|opt)/\w|[A-Z]:\\\\|site-packages"
)


def text_outputs(cell):
    "Every text that a cell's outputs hold, as (kind, text)."
    for out in cell.get("outputs", []):
        if out["output_type"] == "stream":
            yield out["name"], "".join(out["text"])
        elif out["output_type"] == "error":
            yield "error", "\n".join(out["traceback"])
        else:
            for mime, data in out.get("data", {}).items():
                if mime.startswith("text/"):
                    yield mime, "".join(data)


def test_there_are_notebooks():
    assert notebooks()


@pages
def test_title_and_subtitle(path):
    first = load(path)["cells"][0]
    assert first["cell_type"] == "markdown"
    assert re.fullmatch(r"# \S[^\n]*\n\n> \S[^\n]*\n?", source(first)), (
        "the first cell is '# Title', an empty line, '> subtitle', and nothing else: nbdev drops the rest of it from the page"
    )


@pages
def test_clean(path):
    from execnb.nbio import nb2str
    from fastcore.xtras import loads
    from nbdev.clean import clean_nb

    text = path.read_text(encoding="utf-8")
    nb = loads(text)
    clean_nb(nb)
    assert nb2str(nb) == text, "run nbdev_clean"


@pages
def test_outputs(path):
    for cell in load(path)["cells"]:
        for kind, text in text_outputs(cell):
            where = f"the output of the cell that begins {source(cell)[:60]!r}"
            assert kind not in ("stderr", "error"), f"{where} holds {kind}: {text[:300]}"
            assert not (found := elsewhere.search(text)), (
                f"{where} holds a path of some machine: {found[0]}"
            )
            assert not re.search(r"\d+%\|", text), f"{where} holds a progress bar"
            assert "<Figure size" not in text, f"{where} holds the repr of a figure"


@pages
def test_streams_are_whole(path):
    "How a cell's print was cut into pieces depends on the machine's speed; one cell stores one piece."
    for cell in load(path)["cells"]:
        names = [out.get("name") for out in cell.get("outputs", [])]
        assert not any(a and a == b for a, b in itertools.pairwise(names)), (
            f"merge the streams of {source(cell)[:60]!r}"
        )


@pages
def test_size(path):
    assert path.stat().st_size < 3 * 2**20, "outputs are small: use fewer or smaller figures"


@pages
def test_runs_and_does_not_export(path):
    nb = load(path)
    everything = "\n".join(source(c) for c in nb["cells"])
    assert "nbdev_export(" not in everything, "exporting is a command, not a cell"
    assert "skip_exec: true" not in everything, "this notebook would never be tested"
    cells = [c for c in nb["cells"] if c["cell_type"] == "code"]
    run = [c for c in cells if "eval: false" not in marks(c) and "notest" not in marks(c)]
    assert len(run) > len(cells) / 2, "most cells are skipped in the tests"


@pages
def test_imports_stand_alone(path):
    """nbdev runs each cell that imports something when it makes the site, and besides only the exported ones: what else
    stands in such a cell would run too, without what came before it. A hidden cell may set something up."""
    imports = ast.Import, ast.ImportFrom
    for cell in load(path)["cells"]:
        if cell["cell_type"] != "code" or "eval: false" in marks(cell):
            continue
        tree = ast.parse(
            "".join(
                line for line in source(cell).splitlines(True) if not line.startswith(("%", "!"))
            )
        )
        where = f"imports and other code in one cell: split {source(cell)[:80]!r}"
        if exported(cell):
            assert len({isinstance(n, imports) for n in tree.body}) <= 1, where
        elif "hide" not in marks(cell) and any(isinstance(n, imports) for n in ast.walk(tree)):
            assert all(
                isinstance(n, (*imports, ast.FunctionDef, ast.ClassDef)) for n in tree.body
            ), where


@pages
def test_exported_cells(path):
    lengths = []
    for cell in filter(exported, load(path)["cells"]):
        code = "\n".join(
            line for line in source(cell).splitlines() if line.strip() and not line.startswith("#|")
        )
        tree = ast.parse(code).body
        block = tree[0].body if ast.unparse(tree[0]).startswith("if TYPE_CHECKING:") else tree
        imports = [n for n in block if isinstance(n, (ast.Import, ast.ImportFrom))]
        assert not any(
            "nbdev" in ast.unparse(n) or "fastcore" in ast.unparse(n) for n in imports
        ), "the library needs no development tool"
        if not imports:
            lengths.append(len(code.splitlines()))
    assert max(lengths, default=0) <= 60, f"an exported cell of {max(lengths)} lines: split it"


@pages
def test_width(path):
    for cell in load(path)["cells"]:
        if cell["cell_type"] == "code":
            wide = [line for line in source(cell).splitlines() if len(line) > 100]
            assert not wide, f"lines of more than 100 characters: {wide}"


def test_one_notebook_a_module():
    homes = [m for m in map(default_exp, notebooks()) if m]
    assert len(homes) == len(set(homes)), f"two notebooks export to one module: {sorted(homes)}"


def test_numbers_are_unique():
    numbers = [m[0] for p in notebooks() if (m := re.match(r"\d+", p.name))]
    assert len(numbers) == len(set(numbers)), f"two notebooks have one number: {numbers}"


@pages
def test_links(path):
    from urllib.parse import unquote

    for cell in load(path)["cells"]:
        if cell["cell_type"] != "markdown":
            continue
        for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", source(cell)):
            if re.match(r"\w+:", target):
                continue
            assert (path.parent / unquote(target)).exists(), (
                f"a link to {target}, which is not there"
            )
