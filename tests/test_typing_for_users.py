"""A project that uses the library, as its type checker sees it.

The names of `mode` are imported at their first use. A checker reads them from `__init__.pyi`:
without it, everything is of an unknown type, and no mistake is found.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mode


PROGRAM = """\
import jax
import jax.numpy as jnp
import mode

key = jax.random.key(0)
block = mode.TransformerBlock(dim=64, num_heads=4, key=key)
layer = mode.MixtureOfDepths(block, dim=64, capacity=0.125, key=key)
mode.MixtureOfDepths(block, dim="64", capacity=0.125, key=key)  # a mistake
model = mode.mod_transformer(256, 64, depth=4, num_heads=4, key=key)
model = mode.with_capacity(model, 0.25)
sampler = mode.make_causal(model)
tokens = jnp.ones((1, 8), jnp.int32)
mode.testing.assert_causal(sampler, tokens)
text = mode.generate(sampler, tokens, steps=4)
out, (routing, *_) = layer(jnp.ones((1, 8, 64)))
reveal_type(mode.Router)
reveal_type(layer)
reveal_type(sampler)
reveal_type(text)
reveal_type(text.tokens)
reveal_type(routing)
reveal_type(mode.testing.assert_causal)
"""


def test_the_package_says_that_it_has_types() -> None:
    """Pyright looks into any package; others, such as mypy, want to be told."""
    assert Path(mode.__file__ or "").with_name("py.typed").exists()


@pytest.mark.skipif(
    importlib.util.find_spec("pyright") is None,
    reason="needs pyright, which the dependency group `lint` installs",
)
def test_a_user_s_checker_knows_the_types(tmp_path: Path) -> None:
    """It reports the one mistake and nothing else."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "pyrightconfig.json").write_text('{"include": ["program.py"]}')
    command = ["-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    ended = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    reports: list[dict[str, Any]] = json.loads(ended.stdout)["generalDiagnostics"]
    lines = PROGRAM.splitlines()
    errors = [report for report in reports if report["severity"] != "information"]
    assert [lines[report["range"]["start"]["line"]] for report in errors] == [
        next(line for line in lines if line.endswith("# a mistake"))
    ]
    assert errors[0]["rule"] == "reportArgumentType"
    types = [
        report["message"].removeprefix("Type of ").split(" is ", 1)
        for report in reports
        if report["severity"] == "information"
    ]
    revealed = {name.strip('"'): kind.strip('"') for name, kind in types}
    function = revealed.pop("mode.testing.assert_causal")
    assert function.startswith("(model: ")
    assert "Unknown" not in function
    assert revealed == {
        "mode.Router": "type[Router]",
        "layer": "MixtureOfDepths",
        "sampler": "Transformer",
        "text": "Generation",
        "text.tokens": "Array",
        "routing": "Routing",
    }
