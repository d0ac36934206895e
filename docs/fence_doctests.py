"""An extension of Griffe: examples in docstrings become blocks of code, not quotations."""

import re
from typing import Any

import griffe


# A prompt, and all lines up to the next empty one.
_EXAMPLE = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?! *$).+)*", re.MULTILINE)


def fence(text: str) -> str:
    """Puts each run of prompts and their output between fences."""

    def replace(match: re.Match[str]) -> str:
        indent = match["indent"]
        return f"{indent}```pycon\n{match[0]}\n{indent}```"

    return _EXAMPLE.sub(replace, text)


class FenceDoctests(griffe.Extension):
    """Fences the examples of every object that is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Changes the docstring, if there is one."""
        del kwargs
        if obj.docstring is not None:
            obj.docstring.value = fence(obj.docstring.value)
