"""The paper's claims that can be tested at a small scale, each with its test."""

import dataclasses

from .findings import (
    Test,
    best_capacity,
    better,
    costs,
    deeper_than_wider,
    forward_share,
    gap,
    optimum,
    predictor_accuracy,
)


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim.

    **Attributes:**

    - `statement`: in our words.
    - `source`: section or figure of arXiv:2404.02258.
    - `how`: the test, in words.
    - `test`: what it gives.
    """

    statement: str
    source: str
    how: str
    test: Test


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "Learned routing beats routing by noise",
        "4.1, fig. 3",
        "mod against mod-random at one size, causal loss",
        better("mod", "mod-random"),
    ),
    Claim(
        "Learned routing beats routing by noise, each at its best size",
        "4.1, fig. 3",
        "lowest points of the fits over sizes, seed by seed, causal loss",
        optimum("mod", "mod-random"),
    ),
    Claim(
        "Routing by noise is worse than the dense model, each at its best size",
        "4.1, fig. 3",
        "lowest points of the fits over sizes, seed by seed, causal loss",
        optimum("dense", "mod-random"),
    ),
    Claim(
        "Routing every other block is crucial, against every block",
        "4.1",
        "mod against mod-every, causal loss",
        better("mod", "mod-every"),
    ),
    Claim(
        "A capacity of 12.5 % is the best",
        "4.1",
        "mod at that capacity against each other one, causal loss",
        best_capacity,
    ),
    Claim(
        "At equal training FLOPs, the best MoD model beats the best dense one",
        "abstract, 4.1, fig. 4",
        "lowest points of the fits over sizes, seed by seed, causal loss",
        optimum("mod", "dense"),
    ),
    Claim(
        "MoD is as good as the best dense model at fewer FLOPs per forward pass",
        "abstract, 4.1, fig. 4",
        "where MoD's fit over sizes first reaches the lowest point of the dense one, seed by seed",
        forward_share,
    ),
    Claim(
        "The FLOPs saved are better spent on depth than on width",
        "4.1",
        "mod, a deeper against a wider model of about equal forward FLOPs",
        deeper_than_wider,
    ),
    Claim(
        "A predictor says with an accuracy of at least 97 % what top-k takes",
        "3.5, 4.2, fig. 6",
        "mod-predictor at the hidden states of its top-k run, held out",
        predictor_accuracy,
    ),
    Claim(
        "The predictor costs nothing under top-k",
        "3.5",
        "mod-predictor against mod-after, which has none; within 0.1 %",
        costs("mod-predictor", -0.1, 0.1),
    ),
    Claim(
        "Cross entropy on the router costs 0.2 to 0.3 % under top-k",
        "3.5",
        "mod-bce-0.1 against mod-after; the paper gives no weight",
        costs("mod-bce-0.1", 0.2, 0.3),
    ),
    Claim(
        "Going from top-k to the predictor costs little: less than 0.3 %",
        "4.2, fig. 6",
        "causal against top-k loss of mod-predictor; the bound is ours, the paper prints none",
        gap("mod-predictor", 0.3),
    ),
    Claim(
        "With a predictor, causally, MoD is still better than the dense model",
        "4.2, fig. 6",
        "mod-predictor against dense at one size and equal training FLOPs",
        better("mod-predictor", "dense"),
    ),
    Claim(
        "MoD and MoE compound: staged MoDE beats MoE",
        "4.3, fig. 7",
        "mode-staged against moe, causal loss",
        better("mode-staged", "moe"),
    ),
    Claim(
        "MoD and MoE compound: staged MoDE beats MoD",
        "4.3, fig. 7",
        "mode-staged against mod, causal loss",
        better("mode-staged", "mod"),
    ),
    Claim(
        "Integrated MoDE beats lowering the capacity of experts",
        "4.3",
        "mode-integrated against moe-reduced, of equal slots, causal loss",
        better("mode-integrated", "moe-reduced"),
    ),
    Claim(
        "The raw weight of equation 1 trains better than its sigmoid (a question, not a claim)",
        "3.4, 3.5",
        "mod against mod-sigmoid, causal loss",
        better("mod", "mod-sigmoid"),
    ),
)
