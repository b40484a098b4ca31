"""Small arithmetic: an endless, seeded stream of sums as conversations, whose answers are known."""

from __future__ import annotations

from slmkit.data.stories.teller import random_stream

LARGEST = 20  # of what is added
ASKED = ("What is {a} + {b}?", "{a} + {b} = ?", "How much is {a} plus {b}?")
NEAR = (-10, -2, -1, 1, 2, 10)  # how far off a wrong answer is: a slip of counting, or of carrying


def sum_pair(seed: int, index: int, held_out: bool = False) -> tuple[str, str, str]:
    """A question, its answer and a wrong one that is near it: number `index` of the stream `seed`.

    A tenth of all sums is held out: never asked elsewhere, and all that is asked there.
    """
    chance = random_stream("sum", seed, held_out, index)
    while True:
        a, b = chance.randint(0, LARGEST), chance.randint(0, LARGEST)
        if is_held_out(a, b) == held_out:
            break
    wrong = chance.choice([a + b + near for near in NEAR if a + b + near >= 0])
    return chance.choice(ASKED).format(a=a, b=b), str(a + b), str(wrong)


def is_held_out(a: int, b: int) -> bool:
    """Whether nobody who trains ever meets this sum."""
    return random_stream("held-out sum", a, b).random() < 0.1
