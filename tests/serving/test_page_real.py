"""The Chat tab against the real server with real models: what is shown is what the API answers."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.serving.browser import served, until
from tests.serving.servers import gemma, llama
from tests.serving.test_page_chat import ask, box, wait_for_answer, wait_until

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    # The first goes on for thousands of tokens, so that there is something to stop.
    with served({"m1": llama(context=16_384), "m2": gemma()}) as address:
        yield address


def answered(url: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def running_rows(url: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        rows = re.findall(r"^slm_(?:running|waiting)_rows\{.*\} (\S+)$", answer.read().decode(), re.M)
    assert rows
    return sum(map(float, rows))


def generated(url: str) -> float:
    """Tokens of all answers of the first model so far."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        (tokens,) = re.findall(r'^slm_generated_tokens_total\{model="m1"\} (\S+)$', answer.read().decode(), re.M)
    return float(tokens)


def greedy(page: Any, tokens: int) -> None:
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Max tokens").fill(str(tokens))
    page.get_by_label("Show raw text").check()


def test_answers_are_those_of_the_api(url: str, open_page: Open) -> None:
    page = open_page(url)
    greedy(page, 40)
    page.get_by_role("button", name="Side by side").click()
    ask(page, "The fox 🦊", 2)
    ask(page, "And then?", 4)
    for column, model in enumerate(("m1", "m2")):
        messages = []
        for turn, question in enumerate(("The fox 🦊", "And then?")):
            messages.append({"role": "user", "content": question})
            whole = answered(url, model=model, messages=messages, temperature=0, max_tokens=40)
            text = whole["choices"][0]["message"]["content"]
            answer = page.locator(".answer").nth(2 * turn + column)
            assert answer.locator(".body").evaluate("(body) => body.textContent") == text
            foot = answer.locator(".foot").inner_text()
            assert f"{whole['usage']['completion_tokens']} tokens · " in foot
            assert ("limit of tokens" in foot) == (whole["choices"][0]["finish_reason"] == "length")
            messages.append({"role": "assistant", "content": text})


def test_an_answer_that_was_cut_goes_on(url: str, open_page: Open) -> None:
    """As if it had not been cut, as far as the text decides: tokens at the cut may be others."""
    page = open_page(url)
    greedy(page, 12)
    ask(page, "The fox")
    first = page.locator(".answer .body").evaluate("(body) => body.textContent")
    page.get_by_role("button", name="Continue").click()
    until(page, f"document.querySelector('.answer .body').textContent.length > {len(first.encode('utf-16-le')) // 2}")
    wait_for_answer(page)
    whole = page.locator(".answer .body").evaluate("(body) => body.textContent")
    assert whole.startswith(first)
    messages = [{"role": "user", "content": "The fox"}, {"role": "assistant", "content": first}]
    options = {"continue_final_message": True, "add_generation_prompt": False, "temperature": 0, "max_tokens": 12}
    rest = answered(url, model="m1", messages=messages, **options)["choices"][0]["message"]["content"]
    assert whole == first + rest


def test_stop_frees_the_row(url: str, open_page: Open) -> None:
    page = open_page(url)
    greedy(page, 15_000)
    box(page).fill("The fox")
    box(page).press("Enter")
    until(page, "document.querySelector('.answer .body')?.textContent.length > 20")
    assert running_rows(url) == 1
    page.keyboard.press("Escape")
    wait_for_answer(page)
    wait_until(page, lambda: running_rows(url) == 0)
    assert generated(url) < 15_000
    assert "stopped" in page.locator(".answer .foot").inner_text()


def test_closing_the_page_frees_the_row(url: str, open_page: Open) -> None:
    page = open_page(url)
    greedy(page, 15_000)
    box(page).fill("The fox")
    box(page).press("Enter")
    until(page, "document.querySelector('.answer .body')?.textContent.length > 20")
    before = generated(url)
    page.goto("about:blank")
    wait_until(page, lambda: running_rows(url) == 0)
    assert generated(url) - before < 14_000


def test_a_prompt_that_is_too_long_is_one_line(url: str, open_page: Open) -> None:
    page = open_page(url, expect="400")
    page.get_by_label("Model", exact=True).select_option("m2")
    ask(page, "word " * 500)
    assert "256" in page.locator(".answer .error").inner_text()
    page.get_by_role("button", name="Edit").click()
    page.get_by_role("textbox", name="Edit the message").fill("word")
    page.get_by_role("textbox", name="Edit the message").press("Enter")
    wait_for_answer(page)
    assert page.locator(".answer .error").is_hidden()


def test_a_key_of_the_real_server(open_page: Open) -> None:
    with served({"m1": llama()}, keys=["a-key-of-sixteen-letters"]) as url:
        page = open_page(url, expect="401", wait=False)
        page.get_by_label("API key").fill("a-key-of-sixteen-letters")
        page.get_by_label("API key").press("Enter")
        box(page).wait_for()
        page.get_by_label("Max tokens").fill("3")
        ask(page, "Hi")
        assert "3 tokens" in page.locator(".answer .foot").inner_text()
