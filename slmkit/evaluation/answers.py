r"""Numbers and exact match: what counts as the same answer.

`final_number` reads the number that a text answers with, exactly (`Fraction`), by these rules:

- The first number after the last `\boxed{`; else after the last `####`; else after the last "answer is", "answer:" or
  `<answer>`, in all of them after the last `=` of the line; else the last number of the text.
- `1,234.5`, `1 234 567`, `1.234.567`, `1 234` with a non-breaking space, `1{,}234`, `.5`, `1.5e3`, `1.5 × 10^3`,
  `1/2`, `\frac{1}{2}`, `3 1/2`, `½`, `1.5 million`, `$3k` and `12,50 €` are numbers, in the digits of any script.
  Currency, `%`, units and emphasis are dropped: `18%` is 18.
- A minus sign (also `−` and `–`) touches its number or the currency before it, and no letter, digit or bracket stands
  in front: `10-3` is 10 and 3, `- 5` is 5.
- No numbers: words (`seven`), powers (`2^10`), dates (`5/6/2023`), times and ratios (`3:30`), versions (`1.5.2`), what
  follows a letter (`CO2`, `x_1`), `1/0`, more than 1,000 digits, exponents of four digits. In a box and in an expected
  answer also `5x`, `3\pi`, `2\sqrt{3}` and `(1, 2)`: they are more than one number.
- Ambiguous, and read so: `1,234` is one number, not a list; `1.234` is a decimal, not a German thousand; `1,2` is two,
  unless euros, złoty or crowns follow; `1 234` is two; `5-7` is 5 and 7; `0.333` is not 1/3.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

NORMALISATION = (  # what `normalised` does, in this order: a part of the recipe of every exact match
    "NFKC (superscripts kept apart)",
    "case folded",
    "quotes, emphasis and sentence marks at the ends removed",
    "article at the beginning removed",
    "white space collapsed",
)
LONGEST = 1000  # digits
GROUPING = re.compile(r"(?<=\d)(?<!\d{4})(?:[\u00a0\u2007\u2009\u202f_'\u2019]|\{,\}|,?\\[,!;])(?=\d{3}(?!\d))")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?: \d{3}){2,}|(?:\.\d{3}){2,}(?!\.\d))(?!\d)")
EURO, CENTS = r"(?:€|EUR\b|[Ee]uros?\b|zł|kr\b)", r"(?<![\d.,])(?:\d{1,3}(?:[. ]\d{3})+|\d+),\d\d?"
DECIMAL_COMMA = re.compile(rf"{EURO} ?{CENTS}(?![\d,])|{CENTS}(?= ?{EURO})")
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)|\d+)(?:\.\d+)?|\.\d+"
NUMBER = re.compile(
    rf"""(?<![A-Za-z\d^])(?<!\^\{{)(?<![A-Za-z\d]_)(?<![A-Za-z\d]_\{{)(?<![A-Za-z\d]\^[-+])(?<!\^\{{[-+])
    (?:(?<![A-Za-z\d)\]}}])(?P<sign>[-+]))?(?P<money>(?:\\?[$€£¥₹]|(?:USD|EUR|GBP|Rs\.?))\ ?)?(?P<inner>-(?=[\d.\\]))?
    (?:(?P<other>\d+\s?\^\s?\{{?[-+]?\w+|\d+(?:(?:/\d+){{2,}}|(?::\d+)+|(?:\.\d+){{2,}}))
      |(?:(?P<whole>\d+)\s?)?\\[dt]?frac\s?(?:\{{(?P<over>-?(?:{DIGITS}))\}}\{{(?P<under>{DIGITS})\}}|(?P<short>\d\d))
      |(?:(?P<units>\d+)\ )?(?P<top>\d+)\s?/\s?(?P<bottom>\d+)(?![\d/])
      |(?P<digits>{DIGITS})(?:[eE](?P<exponent>[-+]?\d+)(?!\w)
        |\s?(?:\*|×|\\times|\\cdot)\s?10\s?\^\s?\{{?(?P<ten>[-+]?\d+)\}}?)?
        (?:\ (?P<scale>thousand|million|billion|trillion)\b|(?(money)(?P<letter>[kKMB]|bn)\b(?!\$)|(?!)))?)""",
    re.VERBOSE,
)
SCALE = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12, "k": 3, "K": 3, "M": 6, "B": 9, "bn": 9}
MARKS = (r"\\boxed\s?\{?", r"####(?=[^A-Za-z\n#\d]{0,20}\d)", r"(?i:<answer>|answer\W{0,4}(?:\bis\b|:|=))")
EXPRESSION = re.compile(r"[+*/^_<>]|\\(?:sqrt|pi|log|cdot|times|pm)\b|(?<![A-Za-z\\])[abknxyz](?![A-Za-z])")

UNITS = re.compile(r"\\(?:text|mathrm|mbox)(?:\s?\{[^}\d]*\}|\b)|\^\s?\{?\\circ\}?|°")


def plain(text: str) -> str:
    """NFKC, but `10²` becomes `10^2`, `3½` `3 1/2`; digits of a number stand together, with a decimal point."""
    text = GROUPING.sub("", text.translate(dict.fromkeys(map(ord, "−–‐‑"), "-") | dict.fromkeys((0x200B, 0xFEFF), "")))
    kinds = {"<super>": "^", "<fraction>": " "}
    text = "".join(
        kinds.get(unicodedata.decomposition(character).partition(" ")[0], "") + unicodedata.normalize("NFKC", character)
        for character in unicodedata.normalize("NFC", text)
    ).replace("\u2044", "/")
    text = DECIMAL_COMMA.sub(lambda match: re.sub(r"(?<=\d)[. ](?=\d)", "", match[0]).replace(",", "."), text)
    return THOUSANDS.sub(lambda match: re.sub("[. ]", "", match[0]), text)


def numbers(text: str) -> list[Fraction]:
    """Every number in `text`, in order, exact. See the rules at the top of this file."""
    return [value for match in NUMBER.finditer(plain(text)) if (value := value_of(match)) is not None]


def value_of(match: re.Match[str]) -> Fraction | None:
    part = {name: (found or "").replace(",", "") for name, found in match.groupdict().items()}
    if part["other"] or len(match[0]) > LONGEST or len(part["exponent"] + part["ten"]) > 4:
        return None
    over, under = part["over"] or part["top"] or part["short"][:1], part["under"] or part["bottom"] or part["short"][1:]
    if over and not Fraction(under):
        return None
    value = Fraction(over) / Fraction(under) if over else Fraction(part["digits"])
    value += Fraction(part["whole"] or part["units"] or 0)
    value *= Fraction(10) ** (int(part["exponent"] or part["ten"] or 0) + SCALE.get(part["scale"] or part["letter"], 0))
    return -value if (part["sign"] == "-") != bool(part["inner"]) else value


def only_number(expression: str) -> Fraction | None:
    r"""The number that `expression` is, units aside; None if it is more than that (`2\sqrt{3}`, `(1, 2)`, `5x`)."""
    expression = UNITS.sub(" ", plain(expression).split("=")[-1])
    found = numbers(expression)
    return found[0] if len(found) == 1 and not EXPRESSION.search(NUMBER.sub(" ", expression)) else None


def final_number(text: str) -> Fraction | None:
    """The number that `text` answers with, or None: no answer. See the rules at the top of this file."""
    text = plain(text)
    for mark in MARKS:
        if ends := [match.end() for match in re.finditer(mark, text)]:
            line = text[ends[-1] :].lstrip().split("\n")[0]
            if mark == MARKS[0]:
                return only_number(inside(line))
            if found := numbers(line.split("=")[-1]) or numbers(line):
                return found[0]
    return next(reversed(numbers(text)), None)


def inside(text: str) -> str:
    """`text` up to the brace that closes what was opened before it."""
    depth = 1
    for at, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if not depth:
            return text[:at]
    return text


def normalised(text: str) -> str:
    """`text` after every step of `NORMALISATION`. A text of nothing but marks, or of one article, keeps them."""
    text = " ".join(plain(text).casefold().split())
    text = text.strip("\"'`*_“”‘’«».,;:!? ") or text
    return re.sub(r"^(?:an?|the) (?=\S)", "", text)


def expected_answers(task: Any, doc: Mapping[str, Any]) -> list[str]:
    """The answers that an lm-eval task accepts; of a solution that ends with `#### 18`, 18."""
    target = task.doc_to_target(doc)
    if task.config.doc_to_choice is not None and isinstance(target, int):
        target = task.doc_to_choice(doc)[target]
    return [str(one).split("#### ")[-1] for one in (target if isinstance(target, list) else [target])]


def extra_metrics(task: Any, doc: Mapping[str, Any], response: str, filtered: Any = None) -> dict[str, float]:
    """What slmkit adds to lm-eval's own metrics of one document, each 0.0 or 1.0.

    `task`: an lm-eval `ConfigurableTask`. `response`: the text that the model gave, before any filter. `filtered`: what
    one filter of the task made of it. Empty for a task without exact match.

    - `exact_match_raw`, `exact_match_normalised` where the task uses lm-eval's exact match: `filtered` against the
      expected answer (after `####` where it has that), as it is and after `NORMALISATION`.
    - `number`, `no_number` where the task is about numbers (mathematics) and the expected answer is one: whether
      `final_number(response)` equals it, and whether there is none (which is wrong, too). Other documents of the task
      lack the two.
    """
    if task.OUTPUT_TYPE != "generate_until" or "exact_match" not in task._metric_fn_list:
        return {}
    expected = expected_answers(task, doc)
    values: dict[str, float] = {}
    if task._metric_fn_list["exact_match"] is not None:
        given = filtered if isinstance(filtered, str) else response
        values["exact_match_raw"] = float(given in expected)
        values["exact_match_normalised"] = float(normalised(given) in map(normalised, expected))
    right = {only_number(one) for one in expected}
    if re.search("gsm|math|arithmetic|svamp|asdiv", str(task.config.task)) and None not in right:
        number = final_number(response)
        values |= {"number": float(number in right), "no_number": float(number is None)}
    return values
