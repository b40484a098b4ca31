"""A text that is still being written is shown as far as it is certain, whatever its tokens are."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from slmkit.config import UserError
from slmkit.generation.text import LONGEST_STOP, MOST_STOPS, StopStrings, WholeCharacters
from tests.generation.helpers import ByteTokens

TEXTS = st.text(alphabet="abé🦊\ufffd \n", max_size=12)
SCRAPS = st.lists(st.sampled_from([b"\x9f\xa6", b"\xf0\x9f", b"\xe2\x82", b"\xc3", b"\xef\xbf\xbd"]), max_size=30).map(
    b"".join
)  # bytes of which most become no character


def pieces_of(tokens: Sequence[bytes]) -> list[str]:
    characters = WholeCharacters(ByteTokens(tokens).decode)
    return [*map(characters.add, range(len(tokens))), characters.rest()]


def split_at(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    return [data[start:end] for start, end in itertools.pairwise(places)]


def test_a_character_of_several_tokens_comes_whole() -> None:
    assert pieces_of([b"a", b"\xc3", b"\xa9b", b"\xf0\x9f", b"\xa6", b"\x8a"]) == ["a", "", "éb", "", "", "🦊", ""]


def test_what_stands_before_half_a_character_is_not_held_back() -> None:
    assert pieces_of([b"one \xf0\x9f", b"\xa6\x8a two"]) == ["one ", "🦊 two", ""]


def test_bytes_that_never_become_a_character_are_shown_as_such() -> None:
    assert "".join(pieces_of([b"a", b"\xf0\x9f", b"b", b"\x80"])) == "a\ufffdb\ufffd"


@given(st.one_of(st.binary(max_size=20), SCRAPS, TEXTS.map(str.encode)), st.lists(st.integers(1, 40), max_size=40))
@example(b"\x80" * 20 + "🦊".encode(), list(range(40)))
def test_however_bytes_are_cut_into_tokens_the_pieces_are_the_text(data: bytes, cuts: list[int]) -> None:
    assert "".join(pieces_of(split_at(data, cuts))) == data.decode("utf-8", "replace")


def test_endless_bytes_that_become_no_character_take_the_same_time_each() -> None:
    lengths = []

    def decode(ids: Sequence[int]) -> str:
        lengths.append(len(ids))
        return ByteTokens([b"\x80"]).decode(ids)

    characters = WholeCharacters(decode)
    text = "".join([characters.add(0) for _ in range(300)]) + characters.rest()
    assert text == "\ufffd" * 300
    assert max(lengths) < 20


@given(st.lists(st.sampled_from([b"a", b"\xf0", b"\x9f", b"\xa6", b"\x8a", b"\xc3", b"\xa9"]), max_size=60))
@example([b"a", b"\x80", *[b"\xf0", b"\x9f", b"\xa6", b"\x8a"] * 5])
def test_a_run_of_bytes_that_is_decoded_as_a_whole_or_not_at_all(tokens: list[bytes]) -> None:
    """As SentencePiece's byte tokens are: no piece is shown twice, though a later byte may spoil the whole run."""

    def decode(ids: Sequence[int]) -> str:
        text = ""
        for _, run in itertools.groupby((tokens[index] for index in ids), key=lambda token: token != b"a"):
            data = b"".join(run)
            try:
                text += data.decode()
            except UnicodeDecodeError:
                text += "\ufffd" * len(data)
        return text

    def pieces() -> list[str]:
        characters = WholeCharacters(decode)
        return [*map(characters.add, range(len(tokens))), characters.rest()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slmkit.generation.text.LAST", 1000)  # nothing is dropped
        expected = pieces()
    assert pieces() == expected


def test_a_vocabulary_that_drops_the_space_in_front_keeps_those_between_words() -> None:
    def decode(ids: Sequence[int]) -> str:  # as SentencePiece does
        return "".join([" one", " two", "ly", " three"][index] for index in ids).removeprefix(" ")

    beginning = WholeCharacters(decode)
    assert [beginning.add(index) for index in range(4)] == ["one", " two", "ly", " three"]
    continued = WholeCharacters(decode, before=[0])
    assert continued.add(1) == " two"


@given(TEXTS, st.lists(TEXTS.filter(bool), max_size=3), st.lists(st.integers(1, 12), max_size=6))
def test_where_a_stop_string_ends_a_text_does_not_depend_on_its_pieces(
    text: str, strings: list[str], cuts: list[int]
) -> None:
    stops = StopStrings(strings)
    # One character after the other: the first stop string that is complete ends it; of two, the longer.
    expected = text
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in strings if text[:end].endswith(stop)]
        if starts:
            expected = text[: min(starts)]
            break
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    shown, held = "", ""
    for start, end in itertools.pairwise(places):
        held += text[start:end]
        cut = stops.find(held)
        if cut is not None:
            held = held[:cut]
            break
        ready = len(held) - stops.may_begin(held)
        shown, held = shown + held[:ready], held[ready:]
        assert expected.startswith(shown)  # nothing was shown too early
    assert shown + held == expected


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["\n\n", "END"])
    assert [stops.may_begin(text) for text in ("a\n", "E", "xEN", "END!", "", "e")] == [1, 1, 2, 0, 0, 0]


def test_an_empty_stop_string_stops_nothing() -> None:
    assert StopStrings([""]).find("abc") is None


def test_one_string_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(UserError, match="expected a list of stop strings, .*, found 'STOP'"):
        StopStrings("STOP")


def beginning_at_end(strings: list[str], text: str) -> int:
    """By definition, in quadratic time."""
    beginnings = [string[:length] for string in strings for length in range(1, len(string))]
    return max((len(one) for one in beginnings if text.endswith(one)), default=0)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", max_size=9), max_size=3))
def test_the_longest_beginning_of_a_stop_string_is_held_back(text: str, strings: list[str]) -> None:
    assert StopStrings(strings).may_begin(text) == beginning_at_end(strings, text)


def test_a_long_stop_string_costs_hardly_more_than_a_short_one() -> None:
    strings, text = ["STOP" + "x" * (LONGEST_STOP - 4)] * MOST_STOPS, "The Sun had a red kite, and it ran STO" * 25

    def seconds(find: Callable[[str], int]) -> float:
        """Of the processor; the least of several."""
        taken = []
        for _ in range(5):
            start = time.process_time()
            assert find(text) == 3
            taken.append(time.process_time() - start)
        return min(taken)

    assert 5 * seconds(StopStrings(strings).may_begin) < seconds(lambda text: beginning_at_end(strings, text))


@pytest.mark.parametrize(
    ("stop", "words"),
    [
        (["a" * 1_025], "expected text of at most 1,024 characters, found 1,025"),
        (["a"] * 65, "65 stop strings: at most 64 are allowed"),
        ([None], "a stop string: expected text of at most 1,024 characters, found nothing"),
        ([b"END"], "expected text of at most 1,024 characters, found bytes"),
        (None, r"expected a list of stop strings, such as \['END'\], found 'None'"),
        (5, "expected a list of stop strings, .*, found '5'"),
    ],
)
def test_what_cannot_be_a_stop_string_is_refused(stop: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        StopStrings(stop)
    assert "\n" not in str(caught.value)
