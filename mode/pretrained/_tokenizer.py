"""Tokenizers that come with models."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._checks import check_installed
from ._files import open_model


if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _CONTRACTIONS + (
    r"|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut before pairs are merged, by the names that GGUF has for it: a pattern, or `None`
# for that of GPT-2, and whether each digit stands alone.
_CUTS: dict[str, tuple[str | None, bool]] = {
    "gpt-2": (None, False),
    "default": (None, False),
    "smollm": (None, True),
    "llama-bpe": (_WORDS.format(digits=r"\p{N}{1,3}"), False),
    "qwen2": (_WORDS.format(digits=r"\p{N}"), False),
}
_CONTROL, _USER_DEFINED = 3, 4


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """Loads the tokenizer of a pretrained model.

    **Arguments:**

    - `path`: a folder with `tokenizer.json`, or a GGUF file with byte-pair merges.

    **Returns:** a `tokenizers.Tokenizer`: `tokenizer.encode(text).ids` are the tokens of a text.

    **Raises:** `ValueError` for a path without a tokenizer, one that this library cannot make, or
    one with more tokens than the vocabulary of the model.

    >>> import mode
    >>> tokenizer = mode.pretrained.load_tokenizer("SmolLM2-135M.gguf")  # doctest: +SKIP
    """
    check_installed("tokenizers", "pretrained")
    from tokenizers import Tokenizer

    path = Path(path).expanduser()
    opened = open_model(path)
    if path.is_dir():
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ValueError(
                f"`path` must be a folder with `tokenizer.json`, got {path}. `save` writes it "
                "where it is given a `tokenizer`."
            )
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises `Exception` itself
            raise ValueError(
                f"tokenizer.json must hold a tokenizer, got {file}: {error}."
            ) from error
    else:
        tokenizer = _from_gguf(opened.values)
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    vocab = opened.config.vocab
    if size > vocab:
        raise ValueError(
            f"the tokenizer must have at most {vocab} tokens, the vocabulary of the model, got "
            f"{size}: it belongs to another model."
        )
    return tokenizer


def _from_gguf(values: Mapping[str, Any]) -> "Tokenizer":
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
    )

    def value(name: str, default: Any = None) -> Any:
        return values.get(f"tokenizer.ggml.{name}", default)

    if value("model") != "gpt2":
        raise ValueError(
            "the tokenizer of a GGUF file must be of byte pairs, `gpt2`, got "
            f"{value('model')!r}. Take `tokenizer.json` of the same model."
        )
    kind = value("pre", "default")
    if kind not in _CUTS:
        raise ValueError(
            f"`tokenizer.ggml.pre` must be one of {', '.join(_CUTS)}, got {kind!r}. Take "
            "`tokenizer.json` of the same model."
        )
    tokens: list[str] = value("tokens")
    merges = [tuple(merge.split(" ")) for merge in value("merges")]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    pattern, digits_alone = _CUTS[kind]
    cuts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits_alone else []
    if pattern is not None:
        cuts.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = decoders.ByteLevel()
    types = value("token_type", [])
    for wanted, is_special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, special=is_special, normalized=False)
            for token, number in zip(tokens, types, strict=False)
            if number == wanted
        ]
        tokenizer.add_special_tokens(added) if is_special else tokenizer.add_tokens(added)
    if value("add_bos_token", False):
        start = tokens[value("bos_token_id")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, value("bos_token_id"))]
        )
    return tokenizer
