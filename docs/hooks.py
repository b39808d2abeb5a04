"""What mkdocs does beyond its plugins: equations as MathML, terms of the glossary on hover, and marks such as these.

<!-- mfm sample --help -->                   what the command prints
<!-- config pictures/mfm -->                 a packaged config
<!-- code mfm_lightning.glass.FUNCTION -->   a function's source, without its docstring

Notebooks of docs/notebooks become pages, as they are stored; a link to one leads to its page.
"""

from __future__ import annotations

import ast
import base64
import html
import json
import os
import re
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
TERM = re.compile(r"^(\S[^\n]*)\n:   (.+(?:\n    .+)*)", re.MULTILINE)
CODE = re.compile(r"^<!-- code ([\w.]+) -->$", re.MULTILINE)
FILE = re.compile(r"^<!-- file (.+) -->$", re.MULTILINE)
CONFIG = re.compile(r"^<!-- config (.+) -->$", re.MULTILINE)
NOTEBOOK = re.compile(r"\]\(([\w./-]+)\.ipynb(#[^)]*)?\)")
HELP = re.compile(r"^<!-- mfm (.+) -->$", re.MULTILINE)
PACKAGES = {"mfm_lightning": ROOT, "mfm_rewards": ROOT / "rewards", "mfm_benchmarks": ROOT / "benchmarks"}
# browsers draw no letters by `mathvariant`
LETTERS = {
    r"\mathbb E": "\N{MATHEMATICAL DOUBLE-STRUCK CAPITAL E}",
    r"\mathcal N": "\N{MATHEMATICAL SCRIPT CAPITAL N}",
}
PLAIN_TEXT = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
# terms of the glossary that are explained on hover wherever they stand, besides those in capitals
PLAIN_TERMS = {"oracle", "posterior draw", "posterior draws"}


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """A page for each notebook, with its pictures beside it."""
    for path in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        text, pictures = notebook_page(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """What marks stand for in their place, and the glossary's terms as abbreviations."""
    markdown = FILE.sub(lambda found: moved((ROOT / found[1]).read_text()), markdown)
    markdown = CODE.sub(lambda found: f'```python title="{found[1]}"\n{source(found[1])}\n```', markdown)
    markdown = CONFIG.sub(lambda found: config(found[1]), markdown)
    markdown = NOTEBOOK.sub(page_link, markdown)
    markdown = HELP.sub(lambda found: f"```text\n{output_of(found[1])}\n```", markdown)
    return markdown if page.file.src_uri == "glossary.md" else f"{markdown}\n\n{abbreviations()}\n"


def config(name: str) -> str:
    """A packaged config as a fence with its path."""
    return f'```yaml title="configs/{name}.yaml"\n{(ROOT / "configs" / f"{name}.yaml").read_text()}```'


def on_page_content(html: str, **_: Any) -> str:
    """Equations as MathML, which browsers draw by themselves."""
    return EQUATION.sub(lambda found: mathml(found[2], block=found[1] == "div"), html)


def on_post_page(output: str, **_: Any) -> str:
    """Nothing is fetched: a page that names another machine's script, style or font is an error."""
    found = re.search(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]+"[^>]*>', output)
    if found and 'rel="canonical"' not in found[0]:
        raise ValueError(f"the page fetches from another machine: {found[0]}")
    return output


def page_link(found: re.Match[str]) -> str:
    """A link to a notebook as one to its page."""
    return f"]({found[1]}.md{found[2] or ''})"


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A stored notebook as Markdown, and its pictures by file name."""
    parts, pictures = [], {}
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            shown = {kind: "".join(content) for kind, content in output.get("data", {}).items()}
            if "image/png" in shown:
                name = f"{path.stem}_{len(pictures)}.png"
                pictures[name] = base64.b64decode(shown["image/png"])
                parts.append(f"![Output of the cell above]({name})")
            elif "text/markdown" in shown:
                parts.append(shown["text/markdown"])
            else:
                printed = "".join(output.get("text", "")) or shown.get("text/plain", "")
                parts.append(f"```text\n{printed.rstrip()}\n```")
    title, *rest = parts[0].split("\n", 1)
    parts[0] = f'{title}\n\n<a href="{path.name}" download>Download this page as a notebook</a>\n{"".join(rest)}'
    return "\n\n".join(parts) + "\n", pictures


def mathml(latex: str, block: bool) -> str:
    """An equation of LaTeX, as it stands in a page's HTML, as MathML."""
    latex = html.unescape(latex).strip()
    for command, letter in LETTERS.items():
        latex = latex.replace(command, letter)
    return convert(latex, display="block" if block else "inline")


@cache
def glossary() -> dict[str, str]:
    """Terms of docs/glossary.md, with their first sentences as plain text."""
    found = {}
    for names, text in TERM.findall((ROOT / "docs/glossary.md").read_text()):
        plain = re.sub(r"\[([^\]]+)\]\([^)]*\)|[`*$]", lambda m: m[1] or "", " ".join(text.split()))
        for name in names.split(", "):
            found[name] = plain
    return found


@cache
def abbreviations() -> str:
    """Definitions for Markdown's `abbr`, of terms that a reader may not know: with two capitals, or in PLAIN_TERMS."""
    explained = {name: text for name, text in glossary().items() if re.search(r"[A-Z].*[A-Z]", name)}
    explained |= {name: text for name, text in glossary().items() if name in PLAIN_TERMS}
    return "\n".join(f"*[{name}]: {text}" for name, text in explained.items())


@cache
def output_of(arguments: str) -> str:
    """What `mfm ARGUMENTS` prints, without colours, at 100 columns."""
    command = [sys.executable, "-m", "mfm_lightning", *arguments.split()]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True, env={**os.environ, **PLAIN_TEXT}
    )
    return done.stdout.strip()


def source(dotted: str) -> str:
    """The source of a function, or of a method of a class, by its dotted name, without its docstring.

    Raises:
        ValueError: if there is no such function.
    """
    package, *names = dotted.split(".")
    path, body = PACKAGES[package] / package, []
    while names:
        path /= names.pop(0)
        if path.with_suffix(".py").is_file():
            text = path.with_suffix(".py").read_text()
            body = ast.parse(text).body
            break
    else:
        raise ValueError(f"{dotted}: there is no such module")
    node: Any = None
    for name in names:
        kinds = (ast.FunctionDef, ast.ClassDef)
        node = next((each for each in body if isinstance(each, kinds) and each.name == name), None)
        if node is None:
            raise ValueError(f"{dotted}: {path.with_suffix('.py')} has no {name}")
        body = node.body
    lines = text.splitlines()
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    kept = lines[start : node.end_lineno]
    if ast.get_docstring(node):
        first = node.body[0]
        del kept[first.lineno - 1 - start : first.end_lineno - start]
    return narrow(textwrap.dedent("\n".join(kept)))


def narrow(code: str) -> str:
    """Python in lines of at most 76 characters, so that it fits beside an equation."""
    command = [sys.executable, "-m", "ruff", "format", "--line-length", "76", "-"]
    return subprocess.run(command, input=code, capture_output=True, text=True, check=True).stdout.strip()


def moved(markdown: str) -> str:
    """Links as they are from docs/, in the text of a file of the repository's top."""
    return re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", markdown)
