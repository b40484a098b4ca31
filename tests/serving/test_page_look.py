"""The Look inside tab in a real browser, over a real server and real models: what it shows is what they compute."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api")

from slmkit.evaluation.look import attention_weights, logit_lens, predictions
from slmkit.serving.app import create_app
from slmkit.serving.doors import Limits
from slmkit.serving.models import ServedModel
from slmkit.serving.worker import Worker
from slmkit.workflows.serve import page_functions
from tests.serving.browser import (
    PHONE,
    WIDE,
    expect_contrast,
    expect_names,
    expect_no_sideways_scroll,
    picture,
)
from tests.serving.servers import gemma, llama, running

TEXT = "Once upon a time there was a fox. She waited near the river until the wind came over 12 hills, quite cold."
ODD = "naïve 猫\a\n<b>x</b><script>alert(1)</script>\u202eevil"
TOKEN = ".look-token[role=option]"


@dataclass
class Place:
    url: str
    models: dict[str, ServedModel]

    def ids(self, text: str) -> list[int]:
        return self.models["m1"].tokenizer.encode_prompt(text)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text("{}")  # of both models, as far as the page looks into it
    models = {model.name: model for model in (llama(), gemma())}
    worker, limits = Worker([*models.values()]), Limits()
    worker.start()
    try:
        page = page_functions(worker, models, dict.fromkeys(models, folder), folder, None)
        with running(create_app(worker, models, page), limits, worker) as url:
            yield Place(url, models)
    finally:
        worker.stop()


def look(page: Any, text: str = TEXT, model: str = "m1") -> None:
    """Look at a text, and wait until its tokens are shown."""
    page.get_by_label("Model").select_option(model)
    page.get_by_label("Text, up to").fill(text)
    with page.expect_response(lambda response: response.url.endswith("/page/look")):
        page.get_by_role("button", name="Look inside", exact=True).click()
    page.locator(".look-result .figure").first.wait_for()


def view(page: Any, name: str) -> None:
    page.get_by_role("radio", name=name).check()
    ready = {"Next tokens": ".look-bars button", "Logit lens": ".look-grid td", "Attention": ".look-heads button"}
    page.locator(ready[name]).first.wait_for()


def shares(texts: list[str]) -> list[float]:
    """Percentages as they are written → shares."""
    small = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12, "": 1}
    found = []
    for text in texts:
        one_in = re.fullmatch(r"1 in ([\d.]+)([KMBT]?)", text)
        found.append(1 / float(one_in[1]) / small[one_in[2]] if one_in else float(text.rstrip("%")) / 100)
    return found


@pytest.mark.parametrize("width", [WIDE, PHONE])
@pytest.mark.parametrize("dark", [False, True])
def test_each_view_can_be_read(place: Place, open_page: Callable[..., Any], width: int, dark: bool) -> None:
    page = open_page(place.url, tab="look", width=width, dark=dark)
    look(page, f"{TEXT} {ODD}", "m2")
    page.locator(TOKEN).nth(20).click()
    for name in ("Next tokens", "Logit lens", "Attention"):
        view(page, name)
        page.evaluate("scrollTo(0, 0)")
        page.mouse.move(0, 0)
        expect_contrast(page)
        expect_names(page)
        expect_no_sideways_scroll(page)
        picture(page, f"look-{name.split()[0].lower()}", whole=True)
    assert page.evaluate("document.querySelectorAll('#panel-look :is(b, script):not(.figure b, button b)').length") == 0


def test_tokens_have_their_probabilities(place: Place, open_page: Callable[..., Any]) -> None:
    ids, page = place.ids(TEXT), open_page(place.url, tab="look")
    look(page)
    expected = predictions(place.models["m1"].decoder, ids)
    tokens = page.locator(TOKEN)
    assert tokens.count() == len(ids) + 1
    shown = "".join(tokens.all_text_contents()[len(place.models["m1"].tokenizer.beginning) : -1])
    assert shown.replace("\u00a0", " ") == TEXT
    steps = [0.5, 0.2, 0.05, 0.01, 0.001, 0]
    colours = set()
    for index, p in enumerate(expected.probabilities.tolist()):
        token = tokens.nth(index + 1)
        step = next(number for number, least in enumerate(steps) if p >= least)
        assert token.get_attribute("data-step") == str(step), (index, p)
        name = token.get_attribute("aria-label")
        assert f"rank {expected.ranks[index]:,}," in name
        assert shares([re.search(r": (.*), rank", name)[1]]) == pytest.approx([p], rel=0.06)
        colours.add((step, token.evaluate("node => getComputedStyle(node).backgroundColor")))
    assert len(colours) == len({step for step, _ in colours}) > 2  # a colour for each step
    assert "nothing is before it" in tokens.first.get_attribute("aria-label")
    perplexity = 2 ** -expected.probabilities.log2().mean().item()
    written = f"{perplexity:,.0f}" if perplexity >= 1000 else f"{perplexity:.3g}"
    assert f"{written}\nperplexity" in page.locator(".look-result .look-figures").first.inner_text()


def test_numbers_on_hover_and_by_keyboard(place: Place, open_page: Callable[..., Any]) -> None:
    page = open_page(place.url, tab="look")
    look(page)
    tip, tokens = page.locator(".look-tip"), page.locator(TOKEN)
    assert not tip.is_visible()
    tokens.nth(6).hover()
    assert tip.is_visible()
    assert tip.inner_text() in tokens.nth(6).get_attribute("aria-label")
    page.mouse.move(0, 0)
    assert not tip.is_visible()
    page.locator(f"{TOKEN}[aria-selected=true]").focus()
    last = tokens.count() - 1
    keys = {"ArrowRight": 2, "End": last, "ArrowDown": last, "ArrowLeft": last - 1, "Home": 0, "ArrowUp": 0}
    for key, selected in keys.items():
        page.keyboard.press(key)
        assert page.evaluate("Number(document.activeElement.dataset.place)") == selected, key
        assert page.locator(f"{TOKEN}[aria-selected=true]").count() == 1
        assert tip.inner_text() in tokens.nth(selected).get_attribute("aria-label")


def test_next_tokens_and_what_if(place: Place, open_page: Callable[..., Any]) -> None:
    model, ids = place.models["m1"], place.ids(TEXT)
    page = open_page(place.url, tab="look")
    look(page)
    at = 12
    page.locator(TOKEN).nth(at).click()
    expected = predictions(model.decoder, ids)
    bars = page.locator(".look-bars button")
    likeliest = expected.likeliest_probabilities[at - 1].tolist()
    own = [] if ids[at] in expected.likeliest[at - 1] else [expected.probabilities[at - 1].item()]
    assert shares(bars.locator(".number").all_text_contents()) == pytest.approx(likeliest + own, rel=0.06)
    assert page.locator(".look-bars .own").count() == 1
    chosen = expected.likeliest[at - 1][1].item()
    with page.expect_request("**/v1/completions") as asked:
        bars.nth(1).click()
    body = json.loads(asked.value.post_data)
    assert (body["prompt"], body["temperature"]) == ([*ids[:at], chosen], 0)
    page.get_by_role("button", name="Look inside this text").wait_for()
    answer = asked.value.response().json()["choices"][0]["text"]
    assert answer
    assert page.locator(".look-story > span").last.text_content() == answer
    before = page.locator(f"{TOKEN}.of-kind-next").element_handle()
    with page.expect_request("**/page/look") as asked:
        page.get_by_role("button", name="Look inside this text").click()
    before.wait_for_element_state("hidden")  # the answer is shown, with tokens of its own
    whole = model.tokenizer.decode([*ids[len(model.tokenizer.beginning) : at], chosen]) + answer
    assert json.loads(asked.value.post_data)["text"] == whole
    page.locator(f"{TOKEN}.of-kind-next").click()
    page.get_by_role("heading", name="What comes next").wait_for()


def test_logit_lens(place: Place, open_page: Callable[..., Any]) -> None:
    model, ids = place.models["m1"], place.ids(TEXT)
    page = open_page(place.url, tab="look", width=PHONE)
    look(page)
    view(page, "Logit lens")
    expected, cells = logit_lens(model.decoder, ids), page.locator(".look-grid td")
    assert page.locator(".look-grid tbody tr").count() == 2
    assert cells.count() == 2 * len(ids)

    def written(token: int) -> str:
        data = model.tokenizer.token_bytes(token)
        try:
            return data.decode().translate({code: 0x2400 + code for code in range(32)} | {10: "↵", 9: "⇥", 32: "·"})
        except UnicodeDecodeError:
            return f"bytes {data.hex(' ').upper()}"

    assert (expected.likeliest[0] != expected.likeliest[1]).any()
    assert cells.all_text_contents() == [written(token) for token in expected.likeliest.flatten().tolist()]
    hits = [place for place, token in enumerate(ids[1:]) if expected.likeliest[-1, place] == token]
    framed = page.locator(".look-grid tbody tr:last-child td.own")
    assert [int(cell.get_attribute("data-place")) - 1 for cell in framed.all()] == hits
    box = page.locator(".look-grid")
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")
    expect_no_sideways_scroll(page)

    page.locator(TOKEN).nth(20).click()
    cell = page.locator('.look-grid td[data-place="20"][data-layer="1"]')
    assert cell.evaluate(
        "cell => { const box = cell.closest('.look-grid').getBoundingClientRect(), own = cell.getBoundingClientRect();"
        "return own.left >= box.left && own.right <= box.right + 1 }"
    ), "the chosen column was not scrolled into view"
    cell.focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("({...document.activeElement.dataset})") == {"place": "21", "layer": "0"}
    fact = page.locator(".look-fact:visible").inner_text()
    assert "After layer 1" in fact
    found = shares([re.search(r"with (\S+|1 in \S+?)[;.]", fact)[1], re.search(r"has (.*?)\.?$", fact)[1].rstrip(".")])
    true = [expected.likeliest_probabilities[0, 20].item(), expected.probabilities[0, 20].item()]
    assert found == pytest.approx(true, rel=0.06)
    before = cell.evaluate("cell => cell.style.background")
    page.get_by_role("radio", name="The text's token").check()
    assert cell.evaluate("cell => cell.style.background") != before


def test_attention(place: Place, open_page: Callable[..., Any]) -> None:
    model, ids = place.models["m2"], place.ids(TEXT)
    page = open_page(place.url, tab="look")
    look(page, model="m2")
    view(page, "Attention")
    assert page.locator(".look-layers button").all_inner_texts() == [
        *(f"{layer}\nwindow 16" for layer in range(1, 6)), "6\nfull",
    ]  # fmt: skip
    assert page.locator(".look-heads button").count() == 4
    page.get_by_role("radio", name="Head 1").focus()
    with page.expect_response("**/page/attention"):
        page.keyboard.press("ArrowRight")
    page.get_by_role("heading", name="Layer 1, head 2").wait_for()
    weights = attention_weights(model.decoder, ids, 0)[1]

    query = 25
    page.locator(TOKEN).nth(query).click()
    row = weights[query]
    best = row.argsort(descending=True)[:8]
    assert shares(page.locator(".look-bar-row .number").all_text_contents()) == pytest.approx(
        row[best].tolist(), abs=0.006
    )
    fills = page.locator(TOKEN).evaluate_all("nodes => nodes.map((node) => node.style.background !== '')")
    assert fills == [*((row * 10_000).round() > 0).tolist(), False]
    assert f"attention {page.locator('.look-bar-row .number').first.inner_text()}" in (
        page.locator(TOKEN).nth(int(best[0])).get_attribute("aria-label")
    )

    canvas = page.locator(".look-map")
    canvas.focus()
    for key in ("ArrowUp", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
    fact = page.locator(".look-fact:visible")
    weight = weights[query - 1, query - 2].item()
    assert shares([re.search(r"attends with (\S+) to", fact.inner_text())[1]]) == pytest.approx([weight], abs=0.006)
    assert "1 earlier" in fact.inner_text()
    for _ in range(16):
        page.keyboard.press("ArrowLeft")
    assert "17 earlier" not in fact.inner_text()
    assert "the window is 16" in fact.inner_text()
    page.keyboard.press("Enter")
    assert page.locator(f"{TOKEN}[aria-selected=true]").get_attribute("data-place") == str(query - 1)

    assert len(ids) > 40  # so no tokens are written beside the map, which then fills the canvas
    colour = """(canvas, [row, key, tokens]) => {
        const size = canvas.width / tokens, place = [key, row].map((x) => (x + 0.5) * size);
        return [...canvas.getContext("2d").getImageData(...place, 1, 1).data].join(" ");
    }"""
    at = lambda row, key: canvas.evaluate(colour, [row, key, len(ids)])  # noqa: E731
    hidden = at(3, 10)
    assert at(query + 3, query + 3 - 16) == hidden  # the first position outside of the window
    seen = [key for key in range(query + 3 - 15, query + 3) if weights[query + 3, key] > 0.01]
    assert seen
    assert all(at(query + 3, key) != hidden for key in seen)

    page.get_by_role("radio", name="Layer 6").click()
    page.get_by_role("heading", name="Layer 6, head 2").wait_for()
    full = attention_weights(model.decoder, ids, 5)[1]
    far = [key for key in range(query + 3 - 16) if full[query + 3, key] > 0.01]
    assert far
    assert all(at(query + 3, key) != at(3, 10) for key in far)


def test_the_map_is_drawn_again_in_another_theme(place: Place, open_page: Callable[..., Any]) -> None:
    page = open_page(place.url, tab="look")
    look(page)
    view(page, "Attention")
    light = page.locator(".look-map").evaluate("canvas => canvas.toDataURL()")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("before => document.querySelector('.look-map').toDataURL() !== before", arg=light)


CHAT = {
    "id": "a",
    "nodes": [
        {"parent": -1, "role": "user", "content": "Who wants a kite?"},
        {"parent": 0, "role": "assistant", "answers": [{"model": "m1", "content": "The fox does.", "finish": "stop"}]},
    ],
    "chosen": {"-1": 0, "0": 1},
}


def keeping(chat: dict[str, Any]) -> str:
    """A script that puts a conversation where the Chat tab keeps it."""
    kept = {"slmkit.conversation.a": json.dumps(chat), "slmkit.current": json.dumps("a")}
    return f"for (const [name, text] of Object.entries({json.dumps(kept)})) localStorage.setItem(name, text);"


def test_the_last_chat(place: Place, open_page: Callable[..., Any]) -> None:
    page = open_page(place.url, tab="look", before=keeping(CHAT))
    page.get_by_role("button", name="Take the last chat").click()
    page.locator(TOKEN).first.wait_for()
    messages = [{"role": "user", "content": "Who wants a kite?"}, {"role": "assistant", "content": "The fox does."}]
    expected = place.models["m1"].tokenizer.encode_chat(messages)
    answers = page.locator(TOKEN).evaluate_all("nodes => nodes.map((node) => node.classList.contains('of-answer'))")
    assert answers == [*expected.trained, False]
    assert page.locator(f"{TOKEN}[aria-selected=true]").get_attribute("data-place") == str(expected.trained.index(True))
    assert "perplexity of the answers" in page.locator(".look-result .look-figures").first.inner_text()


def test_of_a_long_chat_the_last_turn(place: Place, open_page: Callable[..., Any]) -> None:
    before = {"parent": -1, "role": "user", "content": "One word after another. " * 200}
    answer = {"parent": 0, "role": "assistant", "answers": [{"model": "m1", "content": "Yes.", "finish": "stop"}]}
    later = [{**node, "parent": node["parent"] + 2} for node in CHAT["nodes"]]
    later[0]["parent"] = 1
    chat = {"id": "a", "nodes": [before, answer, *later], "chosen": {"-1": 0, "0": 1, "1": 2, "2": 3}}
    page = open_page(place.url, tab="look", before=keeping(chat), expect="400")
    page.get_by_role("button", name="Take the last chat").click()
    page.locator(TOKEN).first.wait_for()
    text = "".join(page.locator(TOKEN).all_text_contents())
    assert "Who wants a kite?" in text
    assert "One word" not in text
    assert "The last question and answer alone" in page.get_by_role("alert").inner_text()


def test_without_a_chat_and_with_too_long_a_text(place: Place, open_page: Callable[..., Any]) -> None:
    page = open_page(place.url, tab="look", expect="400")
    page.get_by_role("button", name="Take the last chat").click()
    assert "no chat that ends with an answer" in page.get_by_role("alert").inner_text()
    page.get_by_label("Text, up to").fill("word " * 1000)
    page.get_by_role("button", name="Look inside", exact=True).click()
    page.get_by_text("a look inside takes 1 to 512").wait_for()
    assert not page.locator(".look-result").is_visible()
    look(page)
    assert not page.get_by_role("alert").is_visible()


def test_text_is_text(place: Place, open_page: Callable[..., Any]) -> None:
    """Markup, characters in several tokens, and one that turns the writing around."""
    page = open_page(place.url, tab="look")
    look(page, ODD)
    texts = page.locator(TOKEN).all_text_contents()
    assert "<b>x</b><script>alert(1)</script>" in "".join(texts)
    assert "\a" not in "".join(texts)
    assert "\u2407" in "".join(texts)  # the symbol for it
    assert page.evaluate("import('/page/look_tokens.js').then((module) => module.shown('a\u202eb'))") == "a\ufffdb"
    assert {"C3", "AF"} <= {*page.locator(f"{TOKEN}.of-kind-bytes").all_text_contents()} or "ï" in "".join(texts)
    assert page.locator(".look-tokens br").count() == 1
    assert page.locator("#panel-look script").count() == 0
