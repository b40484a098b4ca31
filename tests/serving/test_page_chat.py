"""The Chat tab in Chromium, against a server that says what the test wants."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.serving.browser import (
    PHONE,
    WIDE,
    evaluate,
    expect_contrast,
    expect_names,
    expect_no_sideways_scroll,
    picture,
    running,
    until,
)
from tests.serving.scripted_server import Script

Open = Callable[..., Any]
STORY = """# A fox and a kite

The fox had a **red kite**. It flew *very* high, over `the_hill`.

1. First she ran.
2. Then the wind came:
   - strong
   - cold

> "Come back!" said the fox.

```python
def fly(kite):
    return kite.up(10)
```

See [the story](https://example.org/fox)."""
XSS = """<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 2"> <svg onload=alert(1)>
[a link](javascript:window.hacked=3) ![x](x" onerror="window.hacked=4) <a href="javascript:window.hacked=5">five</a>
`<iframe srcdoc="<script>parent.hacked=6</script>">`

```html"><img src=x onerror=window.hacked=7>
</code></pre><script>window.hacked = 8</script>
```"""


@contextmanager
def chat(open_page: Open, script: Script, **options: Any) -> Iterator[Any]:
    with running(script.app()) as url:
        yield open_page(url, **options)


def box(page: Any) -> Any:
    return page.get_by_role("textbox", name="Message", exact=True)


def ask(page: Any, text: str, answers: int = 1) -> None:
    """Send a message, and wait for the end of the answer."""
    box(page).fill(text)
    box(page).press("Enter")
    wait_for_answer(page, answers)


def wait_for_answer(page: Any, answers: int = 1) -> None:
    until(page, f"document.querySelectorAll('.answer[aria-busy=false]').length >= {answers}")
    page.get_by_role("button", name="Send").wait_for()


def wait_until(page: Any, condition: Callable[[], bool]) -> None:
    for _ in range(1200):
        if condition():
            return
        page.wait_for_timeout(100)
    raise AssertionError("it did not happen in time")


def last_answer(page: Any) -> str:
    return page.locator(".answer .body").last.inner_text()


def by_characters(text: str, size: int = 1) -> Callable[[Any], list[str]]:
    return lambda body: [text[at : at + size] for at in range(0, len(text), size)]


# -- streaming --------------------------------------------------------------------------------------------------------


def test_an_event_may_be_split_at_any_byte(open_page: Open) -> None:
    """Also inside a character, between \\r and \\n, and with everything in pieces of a byte."""
    with chat(open_page, Script()) as page:
        text = (
            '\ufeffdata: {"a": "é😀👨‍👩‍👧 हिन्दी"}\r\n\r\n: comment\r\revent: x\n'
            "data:one\r\ndata: two\rdata\r\n\ndata: [DONE]\n\n"
        )
        found = evaluate(page, "eventsOfEverySplit", text)
    assert [json.loads(one) for one in found] == [['{"a": "é😀👨‍👩‍👧 हिन्दी"}', "one\ntwo\n", "[DONE]"]]


@pytest.mark.parametrize("size", [1, 2, 7])
def test_answers_come_whole_from_pieces_of_bytes(open_page: Open, size: int) -> None:
    text = "Grüße, 😀 👨‍👩‍👧 und हिन्दी, שלום."
    script = Script(
        say=by_characters(text), cut=lambda event: [event[at : at + size] for at in range(0, len(event), size)]
    )
    with chat(open_page, script) as page:
        ask(page, "Hi")
        assert last_answer(page) == text


def test_figures_and_why_it_ended(open_page: Open) -> None:
    script = Script(say=by_characters("abcdef"), pause=0.02, finish="length")
    with chat(open_page, script) as page:
        ask(page, "Hi")
        foot = page.locator(".answer .foot").inner_text()
        assert re.search(r"6 tokens · \d+(\.\d)? tokens/s · first after \d+ ms · ended at the limit of tokens", foot)
        script.say, script.finish = by_characters("ghi"), "stop"
        page.get_by_role("button", name="Continue").click()
        wait_for_answer(page)
        assert last_answer(page) == "abcdefghi"
        assert script.asked[1]["messages"][-1] == {"role": "assistant", "content": "abcdef"}
        assert script.asked[1]["continue_final_message"] is True
        assert script.asked[1]["add_generation_prompt"] is False
        assert "limit" not in page.locator(".answer .foot").inner_text()


def test_a_full_context_is_told(open_page: Open) -> None:
    script = Script(models={"tiny": {"chat": True, "context": 16}}, say=by_characters("abcdef"), finish="length")
    with chat(open_page, script) as page:
        ask(page, "Hi")
        assert "the context of 16 tokens is full" in page.locator(".answer .foot").inner_text()


def test_stop_and_escape_close_the_connection(open_page: Open) -> None:
    script = Script(say=by_characters("ab" * 500), pause=0.02)
    with chat(open_page, script) as page:
        for round_, stop in enumerate(
            (lambda: page.get_by_role("button", name="Stop").click(), lambda: page.keyboard.press("Escape")), start=1
        ):
            box(page).fill("Hi")
            box(page).press("Enter")
            until(page, "[...document.querySelectorAll('.answer .body')].at(-1)?.textContent.length > 3")
            stop()
            wait_for_answer(page, round_)
            assert "stopped" in page.locator(".answer .foot").last.inner_text()
            wait_until(page, lambda: script.cut_off >= len(script.asked))
        # What was written so far is part of the conversation.
        assert script.asked[1]["messages"][1]["content"].startswith("abab")


def test_scrolls_along_only_for_a_reader_at_the_end(open_page: Open) -> None:
    script = Script(say=lambda body: [f"line {n}\n\n" for n in range(120)], pause=0.02)
    rest = "(thread) => thread.scrollHeight - thread.scrollTop - thread.clientHeight"
    with chat(open_page, script) as page:
        thread = page.locator(".thread")
        box(page).fill("Hi")
        box(page).press("Enter")
        until(page, "document.querySelectorAll('.body p').length > 40")
        script.pause = 1.0  # a minute is left
        assert thread.evaluate(rest) < 60
        thread.hover()
        page.mouse.wheel(0, -400)
        until(page, "!document.querySelector('.to-end').hidden")
        page.wait_for_timeout(200)  # the wheel has come to rest
        before, lines = thread.evaluate("(thread) => thread.scrollTop"), page.locator(".body p").count()
        assert lines < 120, "it was over too early to tell"
        script.pause = 0.0
        wait_for_answer(page)
        assert page.locator(".body p").count() == 120
        assert thread.evaluate("(thread) => thread.scrollTop") == before
        page.get_by_role("button", name="Latest").click()
        assert thread.evaluate(rest) < 2


def test_an_answer_during_which_the_page_was_left(open_page: Open) -> None:
    with chat(open_page, Script(say=by_characters("ab" * 2000), pause=0.02)) as page:
        box(page).fill("Hi")
        box(page).press("Enter")
        until(page, "document.querySelector('.answer .body')?.textContent.length > 5")
        page.reload()
        wait_for_answer(page)
        assert last_answer(page).startswith("abab")
        assert "stopped" in page.locator(".answer .foot").inner_text()
        page.get_by_role("button", name="Edit").wait_for()


# -- typing -----------------------------------------------------------------------------------------------------------


def test_enter_of_an_input_method_does_not_send(open_page: Open) -> None:
    script = Script()
    with chat(open_page, script) as page:
        box(page).fill("日本")
        evaluate(page, "pressEnterWhileComposing", box(page).element_handle())
        box(page).press("Shift+Enter")
        box(page).press_sequentially("two")
        page.wait_for_timeout(200)
        assert script.asked == []
        box(page).press("Enter")
        wait_for_answer(page)
        assert [body["messages"] for body in script.asked] == [[{"role": "user", "content": "日本\ntwo"}]]
        assert box(page).input_value() == ""

        page.get_by_role("button", name="Edit").click()
        edit = page.get_by_role("textbox", name="Edit the message")
        edit.fill("語")
        evaluate(page, "pressEnterWhileComposing", edit.element_handle())
        edit.press("Shift+Enter")
        edit.press_sequentially("three")
        page.wait_for_timeout(200)
        assert len(script.asked) == 1
        edit.press("Enter")
        wait_for_answer(page)
        assert script.asked[1]["messages"] == [{"role": "user", "content": "語\nthree"}]


def test_a_real_composition(open_page: Open) -> None:
    """By the protocol that Chromium's own input methods use."""
    script = Script()
    with chat(open_page, script) as page:
        box(page).focus()
        session = page.context.new_cdp_session(page)
        session.send("Input.imeSetComposition", {"text": "にほん", "selectionStart": 3, "selectionEnd": 3})
        page.keyboard.press("Enter")  # while it composes
        page.wait_for_timeout(200)
        assert script.asked == []
        session.send("Input.insertText", {"text": "日本"})
        page.keyboard.press("Enter")
        wait_for_answer(page)
        assert script.asked[0]["messages"][0]["content"].strip() == "日本"


def test_long_texts_right_to_left_and_the_growing_box(open_page: Open) -> None:
    script = Script(say=lambda body: ["שלום עולם"])
    with chat(open_page, script) as page:
        low = box(page).bounding_box()["height"]
        page.evaluate("navigator.clipboard.writeText('word '.repeat(20000) + '\\nlast line')")
        box(page).focus()
        page.keyboard.press("Control+V")
        high = box(page).bounding_box()["height"]
        assert low < 60 < high <= 0.4 * page.viewport_size["height"] + 1
        box(page).press("Enter")
        wait_for_answer(page)
        assert len(script.asked[0]["messages"][0]["content"]) == 100_010
        assert box(page).bounding_box()["height"] == low
        assert page.locator(".answer p").evaluate("(node) => getComputedStyle(node).direction") == "rtl"
        folded = page.locator(".question .text").bounding_box()["height"]
        page.get_by_role("button", name="Show all").click()
        assert page.locator(".question .text").bounding_box()["height"] > 4 * folded
        expect_no_sideways_scroll(page)


# -- branches, errors, storage ----------------------------------------------------------------------------------------


def test_edit_retry_and_back(open_page: Open) -> None:
    count = iter(range(1, 100))
    script = Script(say=lambda body: [f"answer {next(count)}"])
    with chat(open_page, script) as page:
        ask(page, "first", 1)
        ask(page, "second", 2)
        page.get_by_role("button", name="Retry").last.click()
        wait_for_answer(page, 2)
        until(page, "document.querySelectorAll('.answer .body')[1].innerText === 'answer 3'")
        assert script.asked[2]["messages"] == script.asked[1]["messages"]

        page.get_by_role("button", name="Edit").first.click()
        page.get_by_role("textbox", name="Edit the message").fill("first, edited")
        page.get_by_role("button", name="Send").first.click()
        until(page, "document.querySelectorAll('.answer .body')[0].innerText === 'answer 4'")
        wait_for_answer(page, 1)
        assert script.asked[3]["messages"] == [{"role": "user", "content": "first, edited"}]
        assert page.locator(".question").count() == 1

        page.locator(".question").get_by_role("button", name="Earlier version").click()
        assert page.locator(".answer .body").all_inner_texts() == ["answer 1", "answer 3"]
        page.locator(".turn").get_by_role("button", name="Earlier version").click()
        assert page.locator(".answer .body").all_inner_texts() == ["answer 1", "answer 2"]
        ask(page, "third", 3)
        contents = [message["content"] for message in script.asked[4]["messages"]]
        assert contents == ["first", "answer 1", "second", "answer 2", "third"]


def test_escape_leaves_a_message_as_it_was(open_page: Open) -> None:
    with chat(open_page, Script()) as page:
        ask(page, "as it was")
        page.get_by_role("button", name="Edit").click()
        page.get_by_role("textbox", name="Edit the message").fill("other")
        page.keyboard.press("Escape")
        assert page.locator(".question .text").inner_text() == "as it was"


def test_an_error_is_one_line_with_a_retry(open_page: Open) -> None:
    script = Script(refuse=(503, "the server <b>ends</b>: try again"))
    with chat(open_page, script, expect="503") as page:
        ask(page, "Hi")
        line = page.locator(".answer .error")
        assert "the server <b>ends</b>: try again" in line.inner_text()
        line.get_by_role("button", name="Retry").click()
        until(page, "document.querySelector('.answer .body').innerText === 'Hello there.'")
        assert page.locator(".answer .error").is_hidden()


def test_a_turn_without_an_answer_is_not_told_to_the_model(open_page: Open) -> None:
    script = Script(refuse=(500, "failed"))
    with chat(open_page, script, expect="500") as page:
        ask(page, "lost")
        ask(page, "kept", 2)
        assert script.asked[1]["messages"] == [{"role": "user", "content": "kept"}]


def test_a_connection_that_breaks(open_page: Open) -> None:
    def broken(body: dict[str, Any]) -> Iterator[str]:
        yield "half"
        raise ConnectionError("gone")

    with chat(open_page, Script(say=broken), expect="ERR_INCOMPLETE") as page:
        ask(page, "Hi")
        assert last_answer(page) == "half"
        assert page.locator(".answer .error").is_visible()


def test_everything_is_there_after_a_reload(open_page: Open) -> None:
    script = Script(models={"tiny": {"chat": True}, "other": {"chat": True}})
    with chat(open_page, script) as page:
        page.get_by_label("Temperature").fill("0.5")
        page.get_by_label("System message").fill("Be brief.")
        page.get_by_label("Model", exact=True).select_option("other")
        ask(page, "one")
        page.get_by_role("button", name="New conversation").click()
        ask(page, "two")
        page.reload()
        wait_for_answer(page)
        assert page.locator(".question .text").inner_text() == "two"
        assert page.get_by_role("navigation").get_by_role("listitem").count() == 2
        page.get_by_role("button", name="one", exact=True).click()
        assert page.locator(".question .text").inner_text() == "one"
        ask(page, "three", 2)
        body = script.asked[-1]
        assert (body["model"], body["temperature"]) == ("other", 0.5)
        assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "user"]
        assert "top_p" not in body
        page.get_by_role("button", name="Delete one").click()
        page.get_by_role("button", name="Delete all").click()
        page.get_by_role("button", name="Really delete all?").click()
        page.reload()
        page.locator(".welcome").wait_for()
        assert page.get_by_role("navigation").get_by_role("listitem").count() == 0


def test_storage_that_is_off_or_spoilt(open_page: Open) -> None:
    off = """for (const name of ["localStorage", "sessionStorage"]) {
      Object.defineProperty(window, name, { get() { throw new Error("off"); } });
    }"""
    circle = {"id": "a", "nodes": [{"parent": 0, "role": "user", "content": "x"}], "chosen": {"-1": 0}}
    kept = {"settings": "{", "conversation.a": json.dumps(circle), "conversation.b": "[1", "theme": "x"}
    spoilt = f"for (const [name, text] of Object.entries({json.dumps(kept)})) localStorage['slmkit.' + name] = text;"
    full = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); };"
    for before in (off, full, spoilt):
        with chat(open_page, Script(), before=before) as page:
            ask(page, "Hi")
            assert page.get_by_role("note").is_visible() == (before != spoilt)
            assert last_answer(page) == "Hello there."
            assert page.get_by_role("navigation").get_by_role("listitem").count() == 1


def test_export(open_page: Open) -> None:
    with chat(open_page, Script()) as page:
        ask(page, "Hi")
        with page.expect_download() as download:
            page.get_by_role("button", name="Export").click()
        content = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert content == {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]
    }


def test_copy(open_page: Open) -> None:
    with chat(open_page, Script(say=by_characters(STORY, 5))) as page:
        ask(page, "Hi")
        page.get_by_role("button", name="Copy the answer").click()
        page.get_by_text("Copied").wait_for()
        assert page.evaluate("navigator.clipboard.readText()") == STORY
        page.get_by_role("button", name="Copy the code").click()
        until(page, "navigator.clipboard.readText().then((text) => text.startsWith('def fly'))")


def test_side_by_side(open_page: Open) -> None:
    script = Script(
        models={"left": {"chat": True}, "right": {"chat": True}}, say=lambda body: [f"I am {body['model']}."]
    )
    with chat(open_page, script) as page:
        page.get_by_role("button", name="Side by side").click()
        ask(page, "Who?", 2)
        assert page.locator(".answer .body").all_inner_texts() == ["I am left.", "I am right."]
        ask(page, "And?", 4)
        told = {body["model"]: body["messages"][1]["content"] for body in script.asked[2:]}
        assert told == {"left": "I am left.", "right": "I am right."}


def test_a_key_is_asked_for(open_page: Open) -> None:
    script = Script(key="right-key-of-16-letters")
    with running(script.app()) as url:
        page = open_page(url, expect="401", wait=False)
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("API key").fill("wrong")
        dialog.get_by_role("button", name="Use this key").click()
        page.get_by_text("That key was not accepted.").wait_for()
        picture(page, "key")
        dialog.get_by_label("API key").fill("right-key-of-16-letters")
        dialog.get_by_label("API key").press("Enter")
        box(page).wait_for()
        ask(page, "Hi")
        page.reload()
        box(page).wait_for()
        assert page.get_by_role("dialog").count() == 0
        assert page.evaluate("JSON.stringify(localStorage).includes('right-key')") is False


def test_models_that_never_saw_a_conversation(open_page: Open) -> None:
    script = Script(models={"plain": {"chat": False}, "unlearned": {"chat": True, "learned_conversations": False}})
    with chat(open_page, script) as page:
        assert "plain has no chat template: it continues your text." in page.get_by_role("note").inner_text()
        ask(page, "Once ")
        ask(page, " Then", 2)
        assert [body["path"] for body in script.asked] == ["completions", "completions"]
        assert script.asked[1]["prompt"] == "Once Hello there. Then"
        page.get_by_label("Model", exact=True).select_option("unlearned")
        assert "never saw a conversation" in page.get_by_role("note").inner_text()
        page.get_by_label("How to ask").select_option("As a conversation")
        ask(page, "Hi", 3)
        assert script.asked[2]["path"] == "chat/completions"


def test_numbers_out_of_range_are_not_sent(open_page: Open) -> None:
    script = Script()
    with chat(open_page, script) as page:
        page.get_by_label("Top-p").fill("3")
        box(page).fill("Hi")
        box(page).press("Enter")
        page.wait_for_timeout(200)
        assert script.asked == []
        assert box(page).input_value() == "Hi"
        page.get_by_role("button", name="Reset").click()
        ask(page, "Hi")
        assert "top_p" not in script.asked[0]


# -- what a model writes is text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_no_markup_runs(open_page: Open, size: int) -> None:
    name = "<img src=x onerror=window.hacked=9>"
    script = Script(models={name: {"chat": True}}, say=by_characters(XSS, size))
    with chat(open_page, script, expect="400") as page:
        ask(page, XSS)
        script.refuse = (400, XSS)
        ask(page, "again", 2)
        page.get_by_label("Show raw text").check()
        page.reload()
        box(page).wait_for()
        page.wait_for_timeout(200)
        assert page.evaluate("window.hacked") is None
        assert page.locator("#panels").locator("script, iframe, a, svg[onload], [onerror], [src=x]").count() == 0
        assert page.locator(".question .text").first.inner_text() == XSS
        assert page.locator(".answer .body").first.inner_text() == XSS
        assert page.locator(".answer .name").first.inner_text() == name


def test_markdown(open_page: Open) -> None:
    with chat(open_page, Script(say=by_characters(STORY, 3))) as page:
        ask(page, "Hi")
        body = page.locator(".answer .body")
        assert body.locator("h3").inner_text() == "A fox and a kite"
        assert body.locator("strong").inner_text() == "red kite"
        assert body.locator("em").inner_text() == "very"
        assert body.locator("ol > li").count() == 2
        assert body.locator("ol ul > li").all_inner_texts() == ["strong", "cold"]
        assert body.locator("pre code").text_content() == "def fly(kite):\n    return kite.up(10)"
        assert body.locator(".link").inner_text() == "the story (https://example.org/fox)"
        assert body.locator("blockquote").inner_text() == '"Come back!" said the fox.'


MARKS = (
    "**a ", "*a ", "_a ", "`", "`a ", "[a](", "> ", "- ", "1. ", "# ", "```", "~~a", "[", "\\", "__a", "- - ", "> - ",
    "a\n- ", "\n", "a\n", "- a\n  - b\n", "(", "[a](b", "``a`",
)  # fmt: skip


def test_markdown_that_grows_is_markdown_from_the_beginning(open_page: Open) -> None:
    """Whatever the deltas, and for texts made of marks alone; in a time that grows as the text does."""
    with chat(open_page, Script()) as page:
        assert evaluate(page, "growsDifferently", STORY) == []
        session = page.context.browser.new_browser_cdp_session()

        def processor_seconds() -> float:
            return sum(each["cpuTime"] for each in session.send("SystemInfo.getProcessInfo")["processInfo"])

        for mark in MARKS:
            before = processor_seconds()
            evaluate(page, "drawn", mark * 20_000)
            assert processor_seconds() - before < 5, mark  # minutes, where each is compared with all before it


# -- looks and access -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [WIDE, PHONE])
@pytest.mark.parametrize("dark", [False, True])
def test_looks(open_page: Open, width: int, dark: bool) -> None:
    settings = {"temperature": 0.8, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    script = Script(
        models={
            "quickstart/chat": {"chat": True, "context": 512, "max_new_tokens": 128, "settings": settings},
            "primer": {"chat": False, "context": 256},
        },
        say=by_characters(STORY, 3),
    )

    def check(name: str) -> None:
        picture(page, f"chat-{name}")
        expect_contrast(page)
        expect_names(page)
        expect_no_sideways_scroll(page)

    with chat(open_page, script, width=width, dark=dark, expect="400") as page:
        check("empty")
        ask(page, "Tell me about the fox.")
        check("answer")
        page.get_by_role("button", name="Edit").click()
        check("edit")
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Retry").click()
        wait_for_answer(page, 1)
        page.get_by_role("button", name="Side by side").click()
        ask(page, "And the bird?", 3)
        check("beside")
        script.refuse = (400, "the prompt has 600 tokens, and the context is 512")
        page.get_by_role("button", name="Side by side").click()
        ask(page, "word " * 600, 4)
        check("error")
        if width == PHONE:
            for name in ("Settings", "Conversations"):
                page.get_by_role("button", name=name).click()
                check(name.lower())
                page.keyboard.press("Escape")


def test_nothing_moves_for_readers_who_want_that(open_page: Open) -> None:
    script = Script(say=lambda body: [""] * 100, pause=0.02)
    for motion in ("reduce", "no-preference"):
        with chat(open_page, script) as page:
            page.emulate_media(reduced_motion=motion)
            box(page).fill("Hi")
            box(page).press("Enter")
            page.locator(".body.writing").wait_for(state="attached")
            name = page.locator(".body").evaluate("(body) => getComputedStyle(body, '::after').animationName")
            assert name == ("none" if motion == "reduce" else "blink")
            page.keyboard.press("Escape")
            wait_for_answer(page)


def test_the_focus_is_not_lost(open_page: Open) -> None:
    with chat(open_page, Script()) as page:
        ask(page, "Hi")
        assert box(page).evaluate("(box) => box === document.activeElement")
        page.get_by_role("button", name="Retry").focus()
        page.keyboard.press("Enter")
        wait_for_answer(page)
        page.get_by_role("group", name="Versions").wait_for()
        assert page.locator(".thread").evaluate("(thread) => thread === document.activeElement")


def test_by_keyboard_alone(open_page: Open) -> None:
    """Every control is reached by Tab, each with a visible focus, and nothing traps it."""
    script = Script(models={"tiny": {"chat": True}, "other": {"chat": True}})
    with chat(open_page, script) as page:
        ask(page, "Hi")
        page.evaluate("document.activeElement.blur()")
        expected, seen = evaluate(page, "controls"), {}
        for _ in range(2 * len(expected)):
            page.keyboard.press("Tab")
            name, is_seen = evaluate(page, "controls", True)
            seen[name] = is_seen
        assert not set(expected) - set(seen)
        assert all(seen[name] for name in expected), seen
        assert page.get_by_role("status").inner_text() == "Hello there."
