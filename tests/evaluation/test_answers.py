"""Numbers and exact match in answers, and the metrics beside lm-eval's own."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from slmkit.evaluation.answers import NORMALISATION, extra_metrics, final_number, normalised, numbers, only_number
from slmkit.evaluation.tasks import load_tasks
from tests.evaluation.task_helpers import write

NUMBERS = {
    # money, thousands, units, emphasis
    "$29.00": 29, "1,234": 1234, "72.": 72, "The total is 72 clips, altogether.": 72, "#### 70,000": 70_000, "18%": 18,
    "**5**": 5, "__5__": 5, r"\boxed{42}": 42, "$1,234.50.": Fraction(2469, 2), "1,234,567": 1_234_567,
    "€ 5": 5, "5 €": 5,
    "5€": 5, "-$5": -5, "$-5": -5, r"-\$29": -29, "USD 29": 29, "USD29": 29, "72cm": 72, "72 km/h": 72,
    "£1,000.00/month": 1000,
    "1.5 million": 1_500_000, "The answer is 20 thousand.": 20_000, "1,00,000": 100_000, "答案是72个": 72,
    "12,50 €": Fraction(25, 2), "€12,50": Fraction(25, 2), "1.234,50 EUR": Fraction(2469, 2),
    "12,5 kr": Fraction(25, 2),
    "1 234 567": 1_234_567, "1 234 567.5 km": Fraction(2469135, 2), "1.234.567": 1_234_567, "1 234": 234, "1,50": 50,
    "$3k": 3000, "$2.5M": 2_500_000, "€1.2bn": 1_200_000_000, "The answer is $3k$.": 3, "3k": 3, "5 EUR": 5,
    # signs
    "-5": -5, "\u22125": -5, "\u20135": -5, "+5": 5, "x=-5": -5, "(-5)": -5, "10-3": 3, "5\u20137": 7, "- 5": 5,
    # fractions, decimals, powers of ten
    "1/2": Fraction(1, 2), r"\frac{1}{2}": Fraction(1, 2), r"\dfrac{3}{4}": Fraction(3, 4), r"\frac12": Fraction(1, 2),
    r"$-\frac{2}{3}$": Fraction(-2, 3), r"\frac{-1}{2}": Fraction(-1, 2), "½": Fraction(1, 2), "3½": Fraction(7, 2),
    "3 1/2": Fraction(7, 2), r"1\frac{3}{4}": Fraction(7, 4), "1,234.56": Fraction(123456, 100), ".5": Fraction(1, 2),
    "-.5": Fraction(-1, 2), "0.1": Fraction(1, 10), "1.5e3": 1500, "1.5E-3": Fraction(3, 2000), "1.5 × 10^3": 1500,
    r"1.5 \times 10^{-3}": Fraction(3, 2000), "3 × 10²": 300,
    # characters
    "７２": 72, "１，２３４": 1234, "٧٢": 72, "1\u00a0234": 1234, "1\u202f234\u202f567 €": 1_234_567, "$\u00a029": 29,
    r"1{,}234": 1234, r"12{,}345\,678": 12_345_678, r"32,\!348": 32_348, "1_000": 1000,
    # where the answer stands
    "First 3, then 4.": 4, "The answer is 5. I had 7 before.": 5, "**Final answer:** $5": 5,
    "<answer>12</answer> of 20": 12,
    "Answer: 5 + 3 = 8": 8, "#### 12\nand 13": 12, "#### Step 1\nSo 72": 72, r"\boxed{7} of 10": 7,
    r"$\boxed{\$1{,}234}$": 1234, r"\boxed{\frac{1}{2}}": Fraction(1, 2), r"\boxed{x = 5}": 5,
    r"\boxed{5 \text{ apples}}": 5, r"\boxed{\text{42 apples}}": 42, "12'345": 12_345, "1’234’567 francs": 1_234_567,
    "\\boxed{\n42\n}": 42, r"\boxed{90^\circ}": 90, "The answer is as follows:\n3 + 4 = 7": 7, "<<48/2=24>>24": 24,
    # none
    "": None, "none": None, "seventy-two": None, "2^10": None, "10²": None, "CO2": None, "x_1": None, "1/0": None,
    r"\boxed{5x}": None, r"\boxed{3\pi}": None, r"\boxed{2\sqrt{3}}": None, r"\boxed{(1, 2)}": None, "9" * 5000: None,
    "1e999999999": None, ",": None, "5/6/2023": None, "3:30": None, "1.5.2": None, "4 runs of 1.5.2": 4,
    "5.6.2023": None, r"\boxed{5k}": None,
}  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS, ids=[text[:40] for text in NUMBERS])
def test_numbers_are_read_as_people_write_them(text: str) -> None:
    assert final_number(text) == NUMBERS[text]


def test_numbers_are_exact() -> None:
    """0.1 + 0.2 as floats is not 0.3; 20 digits are not rounded."""
    assert sum(numbers("0.1 and 0.2")) == Fraction(3, 10)
    assert numbers("12345678901234567890 12345678901234567891")[0] != numbers("12345678901234567891")[0]
    assert numbers("1,234 and 1/2, -3.") == [1234, Fraction(1, 2), -3]


def test_an_expected_answer_is_a_number_only_as_a_whole() -> None:
    assert only_number("70,000") == 70_000
    assert only_number(r"\$18") == 18
    assert [only_number(text) for text in ("5x", "(3, 4)", r"2\sqrt{3}", "x^2+1", "[2,5)", r"10\%", "1011_2")] == [
        *[None] * 5, 10, None,
    ]  # fmt: skip


def test_long_answers_of_repeated_digits_and_signs_take_no_time() -> None:
    start = time.process_time()
    for piece in ("9", "9,", "1 ", "9/", "1^", "-", "{", r"\boxed{", "####", "answer ", "1,111", " "):
        final_number(piece * 2000)
        normalised(piece * 2000)
    assert time.process_time() - start < 60  # seconds; quadratic matching takes minutes


SAME = [
    ("Paris\n", "paris"), ("  Paris. ", "Paris"), ("caf\u00e9", "cafe\u0301"), ("４２", "42"),
    ("The  Eiffel Tower", "eiffel tower"),
    ("\u201cYes\u201d", "yes"), ("**B**", "b"), ("a\u00a0b", "a b"), ("STRASSE", "straße"),
]  # fmt: skip
OTHER = [
    ("10²", "102"), ("-5", "5"), ("3.5", "35"), ("A", "The"), ("(A)", "(B)"), ("x+y", "x-y"),
    ("!", "?"), ("cafe", "café"),
    ("United States", "United Kingdom"),
]  # fmt: skip


def test_normalisation_drops_how_an_answer_is_written_and_nothing_else() -> None:
    assert not [(a, b) for a, b in SAME if normalised(a) != normalised(b)]
    assert not [(a, b) for a, b in OTHER if normalised(a) == normalised(b)]
    assert normalised("A") == "a"  # the letter of a choice, no article
    assert len(NORMALISATION) == 5


def test_metrics_of_a_document(tmp_path) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path / "gsm8k.jsonl", [{"question": "3 + 4?", "answer": "3 + 4 = 7\n#### 7"}] * 2)
    task = load_tasks(["gsm8k"], data=tmp_path, shots=0)["gsm8k"]
    doc = task.eval_docs[0]
    right = {"exact_match_raw": 1, "exact_match_normalised": 1, "number": 1, "no_number": 0}
    assert extra_metrics(task, doc, "So #### 7", "7") == right
    assert extra_metrics(task, doc, "It is 7.", "7.") == right | {"exact_match_raw": 0}
    wrong = {"exact_match_raw": 0, "exact_match_normalised": 0, "number": 0}
    assert extra_metrics(task, doc, "I don't know.", "[invalid]") == wrong | {"no_number": 1}
    assert extra_metrics(task, doc, "8", "8") == wrong | {"no_number": 0}
