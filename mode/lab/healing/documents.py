"""Text as the tokens of a pretrained model."""

from typing import Any

import numpy as np

from ..corpus import Corpus, Documents, end_to_end


def tokenize(corpus: Corpus, tokenizer: Any, start: int | None) -> Corpus:
    """Returns the corpus in tokens, each document after a token that begins documents, if any.

    **Arguments:**

    - `corpus`: of bytes.
    - `tokenizer`: a `tokenizers.Tokenizer`.
    - `start`: the token that begins documents.
    """
    return Corpus(*(_tokenized(side, tokenizer, start) for side in (corpus.train, corpus.held_out)))


def _tokenized(documents: Documents, tokenizer: Any, start: int | None) -> Documents:
    # Behind the start of each document, which is no byte.
    texts = [
        piece[1:].astype(np.uint8).tobytes().decode("utf-8", "replace")
        for piece in np.split(documents.tokens, documents.starts[1:])
    ]
    begin = [] if start is None else [start]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    pieces = [np.array(begin + one.ids, np.uint32) for one in encoded]
    return end_to_end(documents.names, pieces, np.uint32)


def start_token(tokenizer: Any) -> int | None:
    """Returns the token that ends or begins documents, by the names that models have for it."""
    names = ("<|endoftext|>", "<|begin_of_text|>", "<s>")
    found = (tokenizer.token_to_id(name) for name in names)
    return next((token for token in found if token is not None), None)
