"""One thing has one word, in code, tests and documents: words and names that are retired."""

import functools
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PATTERNS = (
    "mode/**/*.py",
    "tests/**/*.py",
    "benchmarks/**/*.py",
    "examples/**/*.py",
    "docs/**/*.md",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "benchmarks/ROUTERS.md",
)


def word(*words: str) -> list[str]:
    """Each word by itself or as a part of a name, such as `num_taken`."""
    return [rf"(?<![A-Za-z]){each}(?![a-z])" for each in words]


# The word that stands for a thing, and what is no longer written for it.
WORDS: dict[str, list[str]] = {
    "capacity": [
        r"\bshares? of\b",
        r"\b(a|an|the|its|another|other|own|what|this) shares?\b",
        r"(\.|\bdef )shares?\b",
        r"(\.|`)fraction\b",
        r"\bfraction=",
    ],
    "max_capacity": [r"(\.|`)limit\b", r"\blimit="],
    "selected": word("taken", "entered", "admit(s|ted)?", "lets? in", "held(?!.out)", "membership"),
    "requested": word("asks", "asked"),
    "dropped": [*word("turn(s|ed) away"), r"\.refused\b", r"\bnum_refused\b", r"\brefused="],
    "sequence, row": word("members?"),
    "DecodeState": [r"\bDecoding\(", r"\bmode\.Decoding\b", r"`Decoding`"],
    "Cache": [r"\bPast\b", r"\bAdded\(", r"\bmode\.Added\b", r"\.left\b", r"`left`"],
}

# The name that a thing has, and those that it had.
NAMES: dict[str, list[str]] = {
    "decode_step": [r"\bmode\.step\b"],
    "continue_generation": [r"\bmode\.sample\b"],
    "stop_token": [r"\bstop="],
    "unstack_layers": [r"\bunrolled\(", r"\bmode\.unrolled\b"],
    "make_causal": [r"\bmode\.causal\b"],
    "causal_selection": [r"\bcausal_membership\b"],
    "IdentityGate and other gates": [r"\bmode\.(Raw|Sigmoid|Tanh|Softmax|SelectedSoftmax)\b"],
    "GELUFeedForward, SwiGLUFeedForward": [r"\bmode\.(GELU|SwiGLU)\b"],
    "QuantileThreshold and others": [
        r"\bThreshold\(",
        r"\bmode\.Threshold\b",
        r"\bBy(Quantile|Logit|Predictor)\b",
        r"\bAbstractRule\b",
    ],
    "ShardingRule": [r"\bmode\.Rule\b"],
    "PARAMETER_RULES and others": [r"\bmode\.(PARAMETERS|BATCH|DECODING)\b"],
    "named_shardings": [r"\bplacement\b"],
    "AbstractTokenSelector": [r"Tokenwise"],
    "RoutingInputs": [r"\bRequest\b"],
    "Assignment": [r"\bmode\.Selection\b", r"\bSelection\("],
    "is_causal": [r"\blooks_ahead\b"],
    "update_router_state": [r"\bupdate_state\b"],
    "is_trainable": [r"\bmode\.trainable\b"],
    "selection_accuracy": [r"\b[Aa]greement\b"],
    "map_router_routings": [r"\bfor_each_router\b"],
    "staged_mode_layer, integrated_mode_layer": [r"\b(staged|integrated)_mode\b"],
    "mod_transformer": [r"\bmod_decoder\b"],
    "interleave": [r"\bevery_other\b"],
    "LayerStack": [r"\bmode\.Stack\b", r"\brepeats_of\b"],
    "first_come_first_served": [r"\bfirst_come\b"],
    "mode.aot": [r"\bmemory_of\b", r"\bExceeded\b", r"\bcompiles_for\b", r"\btesting\.mesh_for\b"],
    "bucket_sizes, run_bucketed": [r"\b_demand\b", r"\bon_demand\b", r"\bslot_counts\b"],
    "_dtypes": [r"\b_precision\b"],
    "_top_k_indices": [r"\b_take_best\b"],
    "all_gather_parameters, shard_batch": [r"\bgathered\(", r"\balong_batch\b"],
    "pad_noop_load": [r"\.without_noop\b"],
    "nothing: it is gone": [
        r"\bposition_bin",
        r"\bthreshold_at\b",
        r"\bdetached_logits\b",
        r"\bstop_trunk\b",
    ],
}

# Where a word means something else: file, a part of the line, and why it stays.
EXCEPTIONS: list[tuple[str, str, str]] = [
    ("tests/test_vocabulary.py", "", "this table"),
    ("CONTRIBUTING.md", "|", "the table of words names those that are retired"),
    ("mode/lab/summary.py", "- `", "columns: a fraction of layers, and the edges of a bin"),
]


@functools.cache
def lines() -> list[tuple[str, int, str]]:
    """Each line of the project with its file and number, without the exceptions."""
    found = []
    for path in sorted({path for pattern in PATTERNS for path in ROOT.glob(pattern)}):
        name = str(path.relative_to(ROOT))
        parts = [part for file, part, _ in EXCEPTIONS if file == name]
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not any(part in line for part in parts):
                found.append((name, number, line))
    return found


@pytest.mark.parametrize("word", [*WORDS, *NAMES])
def test_a_thing_has_one_word(word: str) -> None:
    """No line has one of the words that `word` stands for."""
    retired = re.compile("|".join((WORDS | NAMES)[word]))
    wrong = [
        f"{name}:{number}: {match[0]!r} in {line.strip()}"
        for name, number, line in lines()
        if (match := retired.search(line))
    ]
    assert not wrong, f"write {word}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("name", sorted({name for name, _, _ in EXCEPTIONS}))
def test_every_exception_is_of_a_file_that_exists(name: str) -> None:
    """An exception goes with its file."""
    assert (ROOT / name).exists()
