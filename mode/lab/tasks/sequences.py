"""The tasks: sequences made from a key, in which the class of every token is known.

Each is a function of a key that makes one sequence. `Task.batch` makes many.
"""

import dataclasses
import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

import mode

from ..options import TASK_TEXTS


FILLERS = 16  # ids of tokens that say nothing


class Sequence(eqx.Module):
    """One sequence, or with leading axes many.

    **Attributes:**

    - `tokens`: `[tokens]`, ids.
    - `targets`: `[tokens]`, what is to be predicted at each token.
    - `scored`: `[tokens]`, where it is.
    - `classes`: `[tokens]`, numbers of the names in `Task.classes`.
    """

    tokens: Int[Array, "*batch tokens"]
    targets: Int[Array, "*batch tokens"]
    scored: Bool[Array, "*batch tokens"]
    classes: Int[Array, "*batch tokens"]


@dataclasses.dataclass(frozen=True)
class Task:
    """A kind of sequence.

    `make` makes a sequence of `length` tokens, of ids below `vocab`, from a key. `needed` are the
    classes that a perfect router selects; a routed layer has `slots`, which they fill. `steps` are
    about those in which a model learns it.
    """

    name: str
    about: str
    make: Callable[[PRNGKeyArray], Sequence]
    classes: tuple[str, ...]
    needed: tuple[str, ...]
    vocab: int
    length: int
    slots: int
    steps: int

    @property
    def capacity(self) -> Fraction:
        """The capacity of the routed layer: its slots hold the needed tokens and no others."""
        return Fraction(self.slots, self.length)

    def batch(self, key: PRNGKeyArray, size: int) -> Sequence:
        """Makes `size` sequences."""
        return jax.vmap(self.make)(jax.random.split(key, size))

    def is_needed(self, classes: Int[Array, "*axes"]) -> Bool[Array, "*axes"]:
        """Whether tokens of these classes are needed."""
        numbers = [self.classes.index(name) for name in self.needed]
        return jnp.isin(classes, jnp.array(numbers))


def _sequence(
    tokens: Int[Array, " tokens"],
    classes: Int[Array, " tokens"],
    targets: Int[Array, " tokens"],
    scored_class: int,
) -> Sequence:
    return Sequence(tokens, targets, classes == scored_class, classes)


def _scatter(
    key: PRNGKeyArray, length: int, tokens: Int[Array, " some"], first_filler: int
) -> tuple[Int[Array, " tokens"], Int[Array, " some"]]:
    """Puts tokens, in their order, at random places among filler. Returns the places too."""
    place_key, filler_key = jax.random.split(key)
    places = jnp.sort(jax.random.choice(place_key, length, tokens.shape, replace=False))
    filler = first_filler + jax.random.randint(filler_key, (length,), 0, FILLERS)
    return filler.at[places].set(tokens), places


def recall(length: int = 64, pairs: int = 4, keys: int = 8) -> Task:
    """Associative recall: pairs of a key and a value, filler, then every key as a question.

    At a question the value of its key is to be predicted. Values are needed, which the questions
    read, and questions, which are scored. Keys need no slot: the layer below gives each value its
    key. A question has another id than the key itself.
    """
    values, questions, filler = keys, 2 * keys, 3 * keys

    def make(key: PRNGKeyArray) -> Sequence:
        key_key, value_key, order_key, filler_key = jax.random.split(key, 4)
        chosen = jax.random.permutation(key_key, keys)[:pairs]
        given = jax.random.randint(value_key, (pairs,), 0, keys)
        order = jax.random.permutation(order_key, pairs)
        tokens = filler + jax.random.randint(filler_key, (length,), 0, FILLERS)
        classes = jnp.full(length, 3)
        targets = jnp.zeros(length, int)
        places = 2 * jnp.arange(pairs)
        tokens = tokens.at[places].set(chosen).at[places + 1].set(values + given)
        tokens = tokens.at[length - pairs :].set(questions + chosen[order])
        classes = classes.at[places].set(0).at[places + 1].set(1).at[length - pairs :].set(2)
        targets = targets.at[length - pairs :].set(values + given[order])
        return _sequence(tokens, classes, targets, 2)

    about = f"{pairs} pairs of a key and a value, filler, {pairs} questions for the value of a key"
    names, needed = ("key", "value", "question", "filler"), ("value", "question")
    return Task("recall", about, make, names, needed, filler + FILLERS, length, 2 * pairs, 800)


def words(points: int = 3, density: float = 0.0625, length: int = 64) -> Task:
    """Words of a group: permutations of some points among filler.

    At each permutation the product of all so far is to be predicted. All of them are needed.
    """
    group = list(itertools.permutations(range(points)))
    # Of a large group eight, spread over it, of which no subgroup holds all.
    some = group[:: max(1, len(group) // 8)]
    moved = [[tuple(p[place] for place in product) for p in some] for product in group]
    table = jnp.array([[group.index(product) for product in row] for row in moved])
    count, filler = max(1, round(density * length)), len(some)

    def make(key: PRNGKeyArray) -> Sequence:
        element_key, place_key = jax.random.split(key)
        chosen = jax.random.randint(element_key, (count,), 0, len(some))

        def move(product: Int[Array, ""], element: Int[Array, ""]) -> tuple[Array, Array]:
            return table[product, element], table[product, element]

        _, products = jax.lax.scan(move, jnp.zeros((), table.dtype), chosen)
        tokens, places = _scatter(place_key, length, chosen, filler)
        classes = jnp.ones(length, int).at[places].set(0)
        targets = jnp.zeros(length, int).at[places].set(products)
        return _sequence(tokens, classes, targets, 0)

    about = f"products of {count} permutations of {points} points among filler"
    vocab, names = max(len(group), filler + FILLERS), ("permutation", "filler")
    return Task(f"s{points}", about, make, names, names[:1], vocab, length, count, 1600)


def copy(length: int = 64, span: int = 6, letters: int = 8) -> Task:
    """Copied spans: letters between filler, which come again in the same order.

    A span follows the mark that opens it and is copied, later, behind the second mark. At
    the mark of the copy and at each copied letter the next letter is to be predicted. Spans and
    copies are needed; their letters are the same, and the layer below tells them from the filler,
    which is of the same letters.
    """
    opened, copied = letters, letters + 1

    def make(key: PRNGKeyArray) -> Sequence:
        letter_key, first_key, second_key = jax.random.split(key, 3)
        tokens = jax.random.randint(letter_key, (length,), 0, letters)
        half = length // 2
        first = jax.random.randint(first_key, (), 0, half - span)
        second = half + jax.random.randint(second_key, (), 0, length - half - span - 1)
        inner = jnp.arange(span)
        given = tokens[first + 1 + inner]
        tokens = tokens.at[first].set(opened).at[second].set(copied)
        tokens = tokens.at[second + 1 + inner].set(given)
        classes = jnp.full(length, 2).at[first + 1 + inner].set(0).at[second + inner].set(1)
        targets = jnp.zeros(length, int).at[second + inner].set(given)
        return _sequence(tokens, classes, targets, 1)

    about = f"a span of {span} letters behind a mark, copied later behind another, among letters"
    names, needed = ("span", "copy", "filler"), ("span", "copy")
    return Task("copy", about, make, names, needed, letters + 2, length, 2 * span, 800)


def arithmetic(length: int = 64, variables: int = 4, base: int = 3) -> Task:
    """Sums of variables: assignments of a digit to a variable, filler, then sums of two of them.

    A sum is a token with the one variable and a token with the other, at which the sum modulo
    `base` is to be predicted. Digits are needed, which the second token reads, and that token.
    """
    digit, left = variables, variables + base
    right = left + variables
    filler = right + variables

    def make(key: PRNGKeyArray) -> Sequence:
        order_key, digit_key, left_key, right_key, filler_key = jax.random.split(key, 5)
        order = jax.random.permutation(order_key, variables)
        digits = jax.random.randint(digit_key, (variables,), 0, base)  # of each variable
        lefts = jax.random.permutation(left_key, variables)
        rights = jax.random.permutation(right_key, variables)
        tokens = filler + jax.random.randint(filler_key, (length,), 0, FILLERS)
        places = 2 * jnp.arange(variables)
        first = length - 2 * variables + places
        tokens = tokens.at[places].set(order).at[places + 1].set(digit + digits[order])
        tokens = tokens.at[first].set(left + lefts).at[first + 1].set(right + rights)
        classes = jnp.full(length, 4).at[places].set(0).at[places + 1].set(1)
        classes = classes.at[first].set(2).at[first + 1].set(3)
        sums = (digits[lefts] + digits[rights]) % base
        targets = jnp.zeros(length, int).at[first + 1].set(digit + sums)
        return _sequence(tokens, classes, targets, 3)

    about = f"{variables} variables with digits, filler, {variables} sums of two of them"
    names, needed = ("variable", "digit", "first", "second", "filler"), ("digit", "second")
    vocab = filler + FILLERS
    return Task("arithmetic", about, make, names, needed, vocab, length, 2 * variables, 1600)


class KnownClasses(mode.AbstractTokenSelector):
    """The oracle: selects the tokens that are needed, whatever the router says.

    - `needed`: `[*groups, tokens]`.
    """

    needed: Bool[Array, "*groups tokens"]
    is_causal: ClassVar[bool] = True
    max_capacity: ClassVar[mode.Capacity | None] = None

    def requested_mask(self, inputs: mode.RoutingInputs) -> Bool[Array, "*groups tokens 1"]:
        """See `AbstractTokenSelector`."""
        return self.needed[..., None]


def with_oracle(model: mode.Transformer, task: Task, batch: Sequence) -> mode.Transformer:
    """The model with selectors that know the classes of the tokens of a batch."""
    needed = task.is_needed(batch.classes)

    def change(router: mode.Router) -> mode.Router:
        each = jnp.broadcast_to(needed, (*router.state.layers, *needed.shape))
        return eqx.tree_at(lambda r: r.select, router, KnownClasses(each))

    return mode.map_routers(change, model)


def task_named(name: str, *, density: float = 0.0625) -> Task:
    """Builds a task by its name; `density` is the fraction of the tokens of a word that count.

    **Raises:** `ValueError` for an unknown name.
    """
    if name in ("s3", "s5"):
        return words(int(name[1]), density)
    makes = {"recall": recall, "copy": copy, "arithmetic": arithmetic}
    if name not in makes:
        raise ValueError(f"`tasks` must be of {', '.join(TASK_TEXTS)}, got {name!r}.")
    return makes[name]()
