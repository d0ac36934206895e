"""Builds the site from the pages of the repository, and checks every link inside it.

    uv run --group docs --extra lab --extra pretrained python docs/build.py    # into build/site

The site has the folders of the repository, so that a link between two pages is the same in both.
Examples become pages, each command gets a page of its help text, and formulas become MathML, which
browsers show without a script.
"""

import html
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from latex2mathml.converter import convert

from mode.lab.parse import COMMANDS


ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"
PAGES, SITE = BUILD / "pages", BUILD / "site"
ASSETS = {".md", ".png", ".gz", ".jsonl", ".py"}
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_LINK = re.compile(r'\b(?:href|src)="([^"]+)"')
_ANCHOR = re.compile(r'\b(?:id|name)="([^"]+)"')


def collect() -> None:
    """Copies the pages of the repository, and makes those that are not files of it."""
    shutil.rmtree(BUILD, ignore_errors=True)
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "CITATION.cff"):
        copy(ROOT / name, PAGES / name)
    copy(ROOT / "README.md", PAGES / "index.md")
    for folder in ("docs", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in ASSETS:
                copy(path, PAGES / path.relative_to(ROOT))
    for path in (ROOT / "examples").glob("*.py"):
        write(
            PAGES / "examples" / f"{path.stem}.md",
            f"# {path.name}\n\n```python\n{path.read_text()}```\n",
        )
    for name in ("", *COMMANDS):
        write(PAGES / f"docs/commands/{name or 'index'}.md", command_page(name))
    copy(ROOT / "docs/zensical.toml", BUILD / "zensical.toml")


def copy(source: Path, target: Path) -> None:
    """Copies a file; links to examples and to the README become those of their pages."""
    if source.suffix != ".md":
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
        return
    text = re.sub(r"(\]\([^)]*examples/\w+)\.py\)", r"\1.md)", source.read_text())
    write(target, re.sub(r"(\]\((?:\.\./)*)README\.md", r"\1index.md", text))


def write(target: Path, text: str) -> None:
    """Writes a page, and makes its folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


def command_page(name: str) -> str:
    """Makes the page of a command of `mode-lab`, or of all: its help text, as it is printed."""
    command = [sys.executable, "-m", "mode.lab", *name.split(), "--help"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    title = f"# {f'mode-lab {name}'.strip()}"
    links = [] if name else [f"- [`mode-lab {one}`]({one}.md)" for one in COMMANDS]
    return "\n\n".join([title, f"```text\n{text.rstrip()}\n```", "\n".join(links)]).rstrip() + "\n"


def to_mathml(page: str) -> str:
    """Turns the formulas of a page into MathML."""

    def replace(match: re.Match[str]) -> str:
        return convert(html.unescape(match[3]), display="block" if match[2] == "[" else "inline")

    return _FORMULA.sub(replace, page)


def broken_links() -> list[str]:
    """Finds links between pages that lead to no file, or to no heading."""
    texts = {path.resolve(): path.read_text() for path in SITE.rglob("*.html")}
    anchors = {path: set(_ANCHOR.findall(text)) for path, text in texts.items()}
    broken = []
    for path, text in texts.items():
        if path.name == "404.html":
            continue
        for link in _LINK.findall(text):
            parts = urlsplit(html.unescape(link))
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            anchor = unquote(parts.fragment)
            if not target.exists() or (anchor and anchor not in anchors.get(target, {anchor})):
                broken.append(f"{path.relative_to(SITE.resolve())}: {link}")
    return sorted(set(broken))


def main() -> int:
    """Builds, and says where the site is or which links are broken."""
    collect()
    builder = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    subprocess.run([*builder, "-f", str(BUILD / "zensical.toml")], check=True)
    for path in SITE.rglob("*.html"):
        path.write_text(to_mathml(path.read_text()))
    broken = broken_links()
    for line in broken:
        print(line, file=sys.stderr)
    print(f"{len(list(SITE.rglob('*.html')))} pages in {SITE}, {len(broken)} broken links.")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
