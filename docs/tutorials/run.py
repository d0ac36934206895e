"""Runs the tutorials and writes their pages: text, code, what it printed, and pictures.

    uv run --group docs --extra lab --extra pretrained python docs/tutorials/run.py
    uv run ... python docs/tutorials/run.py --only recursion
    uv run ... python docs/tutorials/run.py --small        # a minute each, writes no page

A tutorial is a Python file in cells, which editors and Jupyter open as a notebook.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import MarkdownExporter
from nbformat import NotebookNode
from nbformat.v4 import new_output
from traitlets.config import Config


HERE = Path(__file__).parent
TUTORIALS = sorted(path.stem for path in HERE.glob("*.py") if path != Path(__file__))


def run(name: str, *, small: bool) -> float:
    """Runs a tutorial, writes its page unless it is a small run, and returns the seconds it took.

    **Raises:** `nbclient.exceptions.CellExecutionError` where a cell fails. The old page stays.
    """
    notebook = jupytext.read(HERE / f"{name}.py")
    if small:  # and compiled in a fraction of the time
        os.environ |= {"TUTORIAL_SMALL": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    start = time.perf_counter()
    client = NotebookClient(notebook, timeout=None, kernel_name="python3")
    client.extra_arguments = ["--matplotlib=inline", "--InlineBackend.figure_formats=retina"]
    client.execute()
    seconds = time.perf_counter() - start
    if not small:
        cores = len(os.sched_getaffinity(0))
        write(name, notebook, f"{seconds / 60:.0f} min on {cores} core{'s'[: cores > 1]}")
    return seconds


def write(name: str, notebook: NotebookNode, time_taken: str) -> None:
    """Writes the page of a notebook that has run, and its pictures in a folder beside it."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = list(shown(cell.outputs))
    config = Config()
    config.ExtractOutputPreprocessor.output_filename_template = name + "/{cell_index}{extension}"
    body, resources = MarkdownExporter(config=config).from_notebook_node(notebook)
    shutil.rmtree(HERE / name, ignore_errors=True)
    for file, content in resources["outputs"].items():
        (HERE / file).parent.mkdir(exist_ok=True)
        (HERE / file).write_bytes(content)
    command = f"`python docs/tutorials/run.py --only {name}`"
    note = f"*Made from [`{name}.py`]({name}.py) by {command}, in {time_taken}.*"
    (HERE / f"{name}.md").write_text(f"{tidy(body)}\n\n{note}\n")


def shown(outputs: list[NotebookNode]) -> Iterator[NotebookNode]:
    """What a cell printed, in one piece, and its pictures; not the values of last lines."""
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    if printed:
        yield new_output("stream", name="stdout", text=printed)
    for output in outputs:
        if output.output_type != "stream" and "image/png" in output.data:
            yield output


def tidy(page: str) -> str:
    """Names each picture after its section, and leaves one blank line where text has several."""
    heading, lines, in_code = "", [], False
    for line in page.strip().splitlines():
        in_code ^= line.startswith("```")
        if line.startswith("#") and not in_code:
            heading = line.strip("# ")
        line = line.rstrip().replace("![png](", f"![{heading}](")
        if line or in_code or (lines and lines[-1]):
            lines.append(line)
    return "\n".join(lines)


def main(names: list[str], small: bool) -> int:
    """Runs the tutorials one after the other."""
    for name in names:
        try:
            print(f"{name}: {run(name, small=small):.0f} s", flush=True)
        except CellExecutionError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=TUTORIALS, choices=TUTORIALS)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    sys.exit(main(options.only, options.small))
