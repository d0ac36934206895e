"""Text as the tokens of a pretrained model."""

import numpy as np

from ..corpus import Corpus, Documents


def tokenize(corpus: Corpus, tokenizer: object, start: int | None) -> Corpus:
    """Returns the corpus in tokens, each document after a token that begins documents, if any.

    **Arguments:**

    - `corpus`: of bytes.
    - `tokenizer`: a `tokenizers.Tokenizer`.
    - `start`: the token that begins documents.
    """
    return Corpus(*(_tokenized(side, tokenizer, start) for side in (corpus.train, corpus.held_out)))


def _tokenized(documents: Documents, tokenizer: object, start: int | None) -> Documents:
    ends = [*documents.starts[1:], len(documents.tokens)]
    # Behind the start of each document, which is no byte.
    texts = [
        documents.tokens[first + 1 : last].astype(np.uint8).tobytes().decode("utf-8", "replace")
        for first, last in zip(documents.starts, ends, strict=True)
    ]
    begin = [] if start is None else [start]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)  # pyright: ignore
    pieces = [np.array(begin + one.ids, np.uint32) for one in encoded]
    starts = np.cumsum([0, *map(len, pieces)])[: len(pieces)]
    return Documents(documents.names, np.concatenate(pieces), starts)


def start_token(tokenizer: object) -> int | None:
    """Returns the token that ends or begins documents, by the names that models have for it."""
    names = ("<|endoftext|>", "<|begin_of_text|>", "<s>")
    found = (tokenizer.token_to_id(name) for name in names)  # pyright: ignore
    return next((token for token in found if token is not None), None)
