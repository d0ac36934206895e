"""Tokenizers of folders and of GGUF files cut text as their models were trained on."""

from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import mode
from tests.pretrained.cases import CONFIGS, make_tensors, write_folder
from tests.pretrained.gguf_files import write_gguf


TEXT = "Über 1234 trees, don't  stop!\n\n  x = 10"
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("Ġ", "t"), ("r", "e"), ("Ġt", "re"), ("1", "2"), ("12", "3"), ("'", "t")]
TOKENS = ["<|endoftext|>", *LETTERS, *("".join(pair) for pair in MERGES)]
CONFIG = {**CONFIGS["llama"], "vocab_size": len(TOKENS)}


def _write_gguf(path: Path, **values: Any) -> Path:
    values = {"model": "gpt2", "pre": "gpt-2", "tokens": TOKENS, **values}

    def prepare(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model(values["model"])
        writer.add_tokenizer_pre(values["pre"])
        writer.add_token_list(values["tokens"])
        writer.add_token_types([3, *[1] * (len(values["tokens"]) - 1)])
        writer.add_token_merges([" ".join(pair) for pair in MERGES])
        if values.get("bos"):
            writer.add_add_bos_token(True)
            writer.add_bos_token_id(0)

    write_gguf(path, CONFIG, make_tensors(CONFIG), prepare=prepare)
    return path


def test_byte_pairs_of_a_gguf_file(tmp_path: Path) -> None:
    tokenizer = mode.pretrained.load_tokenizer(_write_gguf(tmp_path / "m.gguf"))
    pieces = tokenizer.encode(TEXT).tokens
    assert tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT
    assert "Ġtre" in pieces
    assert "123" in pieces
    assert "'t" in pieces
    special = tokenizer.encode("a<|endoftext|>b").ids
    assert special[1] == 0
    assert len(special) == 3


@pytest.mark.parametrize(
    ("pre", "digits"),
    [
        ("smollm", ["1", "2", "3", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
        ("llama-bpe", ["123", "4"]),
    ],
)
def test_digits_are_cut_as_the_model_has_them(pre: str, digits: list[str], tmp_path: Path) -> None:
    tokenizer = mode.pretrained.load_tokenizer(_write_gguf(tmp_path / "m.gguf", pre=pre))
    pieces = tokenizer.encode(TEXT).tokens
    assert [piece for piece in pieces if piece.isdecimal()][: len(digits)] == digits
    assert tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT


def test_a_first_token_where_the_file_wants_one(tmp_path: Path) -> None:
    tokenizer = mode.pretrained.load_tokenizer(_write_gguf(tmp_path / "m.gguf", bos=True))
    assert tokenizer.encode("a").ids == [0, TOKENS.index("a")]
    assert tokenizer.encode("a", add_special_tokens=False).ids == [TOKENS.index("a")]


def test_what_is_refused(tmp_path: Path) -> None:
    for number, (values, match) in enumerate(
        [
            ({"model": "llama"}, "gpt2.*llama"),
            ({"pre": "deepseek"}, "deepseek"),
            ({"tokens": [*TOKENS, "more"]}, "another model"),
        ]
    ):
        path = _write_gguf(tmp_path / f"{number}.gguf", **values)
        with pytest.raises(ValueError, match=match):
            mode.pretrained.load_tokenizer(path)


def test_tokenizers_of_folders(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", CONFIG, make_tensors(CONFIG))
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        mode.pretrained.load_tokenizer(folder)
    own = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(TOKENS)}, merges=MERGES))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    own.save(str(folder / "tokenizer.json"))
    assert mode.pretrained.load_tokenizer(folder).encode(TEXT).ids == own.encode(TEXT).ids
    mode.pretrained.save(mode.pretrained.load(folder), tmp_path / "again", tokenizer=own)
    assert (
        mode.pretrained.load_tokenizer(tmp_path / "again").encode(TEXT).ids == own.encode(TEXT).ids
    )
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        mode.pretrained.load_tokenizer(folder)
    own.add_tokens(["more", "and more"])
    own.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="another model"):
        mode.pretrained.load_tokenizer(folder)
