"""README.md is the front page of the site, nbs/index.ipynb, turned into Markdown.

python tools/readme.py make            write README.md
python tools/readme.py check           fail when README.md is not what `make` would write
python tools/readme.py command NAME    print the set-up command NAME (demo, test) that README.md shows
"""

import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
nbs, images = root / "nbs", "images"


def directives(source):
    "The `#| ...` lines of a cell, as a list of texts, and the source without them."
    lines = source.splitlines()
    marks = [line[2:].strip() for line in lines if line.startswith("#|")]
    return marks, "\n".join(line for line in lines if not line.startswith("#|")).strip("\n")


def shown(cell):
    "The cell as a reader of the site sees it, or None when it is hidden there."
    marks, source = directives(cell.source)
    if {"hide", "include: false"} & set(marks):
        return None
    if cell.cell_type == "markdown":
        return cell
    cell.source = source
    if {"echo: false", "hide_input"} & set(marks):
        cell.metadata["transient"] = {"remove_source": True}
    if {"output: false", "hide_output"} & set(marks):
        cell.outputs = []
    return cell


def joined(cells):
    "Code that prints nothing goes into one block with the code that follows it."
    out = []
    for cell in cells:
        last = out[-1] if out else None
        if (
            last
            and last.cell_type == cell.cell_type == "code"
            and not last.outputs
            and "transient" not in cell.metadata
        ):
            cell.source = f"{last.source}\n{cell.source}"
            out.pop()
        out.append(cell)
    return out


def relink(text):
    "Links and images relative to nbs/, made relative to the top folder."

    def fix(match):
        target = match[2].split("#")[0]
        return (
            f"{match[1]}nbs/{match[2]}{match[3]}"
            if target and (nbs / target).exists()
            else match[0]
        )

    text = re.sub(r"(\]\()(?!\w+:|/|#)([^)\s]+)(\))", fix, text)
    return re.sub(r"(<img[^>]* src=\")(?!\w+:|/)([^\"]+)(\")", fix, text)


def render():
    "The text of README.md, and its figures as {name in nbs/images: bytes}."
    import nbformat
    from nbconvert import MarkdownExporter

    nb = nbformat.read(nbs / "index.ipynb", as_version=4)
    nb.cells = joined([cell for cell in map(shown, nb.cells) if cell is not None])
    nb.metadata["language_info"] = {"name": "python"}
    body, resources = MarkdownExporter().from_notebook_node(
        nb, resources={"output_files_dir": images}
    )
    figures = {}
    for i, (name, data) in enumerate(sorted(resources["outputs"].items())):
        new = f"readme-{i}{Path(name).suffix}"
        body = body.replace(Path(name).as_posix(), f"nbs/{images}/{new}")
        figures[new] = data
    body = re.sub(r"!\[(png|svg|jpeg)\]", "![]", relink(body))
    return re.sub(
        r"\n{3,}", "\n\n", "\n".join(map(str.rstrip, body.splitlines()))
    ).strip() + "\n", figures


def differences():
    "What on disk is not as `render` makes it: a list of paths."
    body, figures = render()
    readme, folder = root / "README.md", nbs / images
    wrong = [] if readme.exists() and readme.read_text(encoding="utf-8") == body else ["README.md"]
    wrong += [
        f"nbs/{images}/{n}"
        for n, data in figures.items()
        if not (folder / n).exists() or (folder / n).read_bytes() != data
    ]
    return wrong + [
        f"nbs/{images}/{p.name}" for p in folder.glob("readme-*") if p.name not in figures
    ]


def make():
    body, figures = render()
    folder = nbs / images
    for old in folder.glob("readme-*"):
        old.unlink()
    if figures:
        folder.mkdir(exist_ok=True)
    for name, data in figures.items():
        (folder / name).write_bytes(data)
    (root / "README.md").write_text(body, encoding="utf-8")


def command(name, text=None):
    "The one line in the fenced block that follows `<!-- command: name -->`."
    text = text if text is not None else (root / "README.md").read_text(encoding="utf-8")
    found = re.findall(
        rf"<!-- command: {re.escape(name)} -->\s*```\w*\n(.*?)\n\s*```", text, re.DOTALL
    )
    if len(found) != 1 or "\n" in found[0].strip():
        raise SystemExit(
            f"README.md should hold one line of code after one <!-- command: {name} -->; found {found}"
        )
    return found[0].strip()


def main(args):
    match args:
        case ["make"]:
            make()
        case ["check"]:
            if wrong := differences():
                sys.exit(f"not as `python tools/readme.py make` writes them: {wrong}")
        case ["command", name]:
            print(command(name))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
