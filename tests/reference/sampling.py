"""The distribution that a sampler draws from."""

import numpy as np

from .assignment import Floats, as_float64
from .gates import softmax


def sampling_distribution(
    logits: Floats, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> Floats:
    """`[vocab]`: top-k (Fan et al. 2018), then the nucleus of what is left (Holtzman et al. 2020).

    The nucleus is the smallest set of likeliest tokens whose probabilities reach `top_p`.
    """
    logits = as_float64(logits)
    result = np.zeros(len(logits))
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if temperature == 0:
        result[ranked[0]] = 1
        return result
    kept = ranked[:top_k]
    probabilities = softmax(logits[kept] / temperature)
    nucleus, reached = [], 0.0
    for token, probability in zip(kept, probabilities, strict=True):
        nucleus.append(token)
        reached += probability
        if reached >= top_p:
            break
    result[nucleus] = softmax(logits[nucleus] / temperature)
    return result
