"""Small arithmetic: an endless, seeded stream of sums as conversations with known answers."""

from __future__ import annotations

from slmkit.data.stories.teller import random_stream

LARGEST = 20  # largest summand
ASKED = ("What is {a} + {b}?", "{a} + {b} = ?", "How much is {a} plus {b}?")
NEAR = (-10, -2, -1, 1, 2, 10)  # errors of wrong answers: off by one or two, or a wrong carry


def sum_pair(seed: int, index: int, held_out: bool = False) -> tuple[str, str, str]:
    """A question, its answer and a wrong one close to it: item `index` of the stream `seed`.

    A tenth of all sums is held out: asked only with `held_out`.
    """
    chance = random_stream("sum", seed, held_out, index)
    while True:
        a, b = chance.randint(0, LARGEST), chance.randint(0, LARGEST)
        if is_held_out(a, b) == held_out:
            break
    wrong = chance.choice([a + b + near for near in NEAR if a + b + near >= 0])
    return chance.choice(ASKED).format(a=a, b=b), str(a + b), str(wrong)


def is_held_out(a: int, b: int) -> bool:
    """Whether this sum is held out from training."""
    return random_stream("held-out sum", a, b).random() < 0.1
