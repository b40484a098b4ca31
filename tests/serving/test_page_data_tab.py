"""The tab Data in a real browser: tokens of a text, rows of a real fine-tuning, documents of shards."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slmkit.data.prepare.text_to_shards import prepare_text
from slmkit.data.shards.reader import TokenShards
from slmkit.data.sources import Document
from slmkit.tokenizer import SLMTokenizer
from tests.serving.browser import (
    PHONE,
    WIDE,
    expect_contrast,
    expect_names,
    expect_no_sideways_scroll,
    picture,
    running,
)
from tests.serving.test_page_runs import until
from tests.workflows.page_runs import make_runs, page_app

OpenPage = Callable[..., Any]
MIXED = "a😀b\nשלום <b>x</b>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def trained(folder: Path) -> SLMTokenizer:
    return SLMTokenizer.from_pretrained(folder / "chat")


@pytest.fixture(scope="module")
def url(folder: Path, trained: SLMTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    shards = tmp_path_factory.mktemp("shards")
    long = " ".join(f"word {number}" for number in range(2000))
    prepare_text([Document(f"<i>text</i> {n}") for n in range(25)] + [Document(long)], trained, shards / "many")
    with running(page_app(folder, {"trained": trained, "bytes": SLMTokenizer(260)}, shards)) as address:
        yield address


def labels(page: Any, of: str) -> list[str]:
    return (
        page.get_by_role("group", name=f"Tokens of {of}", exact=True)
        .locator(".token")
        .evaluate_all("nodes => nodes.map((node) => node.getAttribute('aria-label'))")
    )


def test_emoji_and_right_to_left_text(url: str, open_page: OpenPage) -> None:
    page = open_page(url, tab="data")
    page.get_by_label("Tokenizer of").select_option("bytes")
    page.get_by_label("Text", exact=True).fill(MIXED)
    ids = SLMTokenizer(260).encode(MIXED)
    until(page, lambda: len(labels(page, "bytes")) == len(ids))
    shown = labels(page, "bytes")
    assert shown[:6] == [
        f'"a", id {ids[0]}', f'"😀", id {ids[1]}', f"9F, id {ids[2]}", f"98, id {ids[3]}", f"80, id {ids[4]}",
        f'"b", id {ids[5]}',
    ]  # fmt: skip
    area = page.get_by_role("group", name="Tokens of bytes")
    assert area.locator(".whole").all_inner_texts() == ["😀", "ש", "ל", "ו", "ם"]
    assert area.locator("b").count() == 0
    lefts = area.locator(".whole").evaluate_all("nodes => nodes.map((node) => node.getBoundingClientRect().left)")
    assert lefts[1] > lefts[2] > lefts[3] > lefts[4]  # the line reads from right to left
    figures = dict(reversed(figure.split("\n")) for figure in page.locator(".sides .figure").all_inner_texts())
    assert figures["tokens"] == str(len(ids))
    assert figures["characters per token"] == f"{len(MIXED) / len(ids):.2f}"
    assert figures["bytes per token"] == "1.00"


def test_tokens_by_keyboard(url: str, open_page: OpenPage) -> None:
    page = open_page(url, tab="data")
    page.get_by_label("Tokenizer of").select_option("bytes")
    page.get_by_label("Text", exact=True).fill("aאב")
    until(page, lambda: len(labels(page, "bytes")) == 5)
    about = page.locator(".token-about")
    page.locator(".token").first.focus()
    assert about.inner_text() == f'token 1: "a", id {SLMTokenizer(260).encode("a")[0]}, bytes 61'
    page.keyboard.press("ArrowRight")
    assert about.inner_text().startswith('token 2: "א"')
    assert about.inner_text().endswith("bytes D7, with the 1 after it")
    page.keyboard.press("End")
    assert about.inner_text().startswith("token 5: –")
    page.keyboard.press("Home")
    assert page.evaluate("document.activeElement.dataset.index") == "0"
    page.locator(".token").nth(3).hover()
    assert about.inner_text().startswith('token 4: "ב"')


def test_two_tokenizers_side_by_side(url: str, trained: SLMTokenizer, open_page: OpenPage) -> None:
    page = open_page(url, tab="data")
    page.get_by_label("Text", exact=True).fill("Once there was<|im_end|>")
    page.get_by_label("Compare with").select_option("bytes")
    expected = len(trained.encode("Once there was<|im_end|>"))
    until(page, lambda: len(labels(page, "trained")) == expected and len(labels(page, "bytes")) == 24)
    page.get_by_label("Read spelled special tokens").check()
    until(page, lambda: len(labels(page, "bytes")) == 15)
    assert labels(page, "trained")[-1].endswith(", special")
    page.get_by_label("Text", exact=True).fill("")
    until(page, lambda: page.get_by_text("No tokens.").count() == 2)


def test_an_answer_that_comes_late_is_dropped(url: str, open_page: OpenPage) -> None:
    page = open_page(url, tab="data")
    page.route("**/page/tokenize", lambda route: delayed(page, route))
    page.get_by_label("Tokenizer of").select_option("bytes")
    area = page.get_by_label("Text", exact=True)
    area.fill("slow")
    page.wait_for_timeout(300)
    area.fill("quick!")
    until(page, lambda: len(labels(page, "bytes")) == 6)
    page.wait_for_timeout(1200)
    assert len(labels(page, "bytes")) == 6


def delayed(page: Any, route: Any) -> None:
    if "slow" in route.request.post_data:
        page.wait_for_timeout(800)
    route.continue_()


def test_rows_of_a_fine_tuning(url: str, folder: Path, open_page: OpenPage) -> None:
    """Learned tokens are coloured, and underlined for those who do not see the colour."""
    page = open_page(url, tab="data")
    page.get_by_role("radio", name="Rows").check()
    page.get_by_role("combobox", name="Data set").select_option("chat/train")
    row = page.get_by_role("region", name="Row 1", exact=True)
    row.locator(".token.learned").first.wait_for()
    told = "nodes => nodes.map((node) => [node.classList.contains('learned'), node.textContent])"
    tokens = row.locator(".token").evaluate_all(told)
    text = "".join(text if is_learned else "\0" for is_learned, text in tokens)
    answers = [part.strip() for part in text.split("\0") if part]
    assert answers
    assert all(answer.endswith("<|im_end|>") or text.endswith(answer) for answer in answers)  # the last may be cut
    style = "node => [getComputedStyle(node).textDecorationLine, getComputedStyle(node).backgroundColor]"
    assert row.locator(".token.learned").first.evaluate(style)[0] == "underline"
    assert row.locator(".token.read").first.evaluate(style)[0] == "none"
    assert row.locator(".token.read").first.evaluate(style)[1] != row.locator(".token.learned").first.evaluate(style)[1]
    assert row.locator(".token.learned").first.get_attribute("aria-label").endswith(", learned")
    ends = row.locator(".token", has_text="<|endoftext|>").count()
    assert row.get_by_role("separator").count() == max(0, ends - 1)

    page.get_by_role("button", name="Next").click()
    page.get_by_role("region", name="Row 3", exact=True).wait_for()
    page.get_by_label("Row number").fill("5")
    page.keyboard.press("Enter")
    page.get_by_role("region", name="Row 5", exact=True).wait_for()
    page.get_by_role("combobox", name="Data set").select_option("answers/dpo/train")
    page.get_by_role("heading", name="Row 1, chosen").wait_for()
    page.get_by_role("heading", name="Row 1, rejected").wait_for()


def test_documents(url: str, open_page: OpenPage) -> None:
    page = open_page(url, tab="data")
    page.get_by_role("radio", name="Documents").check()
    page.get_by_role("combobox", name="Data set").select_option("shards: many")
    documents = page.locator(".document")
    until(page, lambda: documents.count() == 10)
    assert documents.first.locator(".excerpt").inner_text() == "<i>text</i> 0<|endoftext|>"
    page.get_by_role("button", name="Next").click()
    page.get_by_text("Document 11", exact=True).wait_for()
    page.get_by_label("Document number").fill("26")
    page.keyboard.press("Enter")
    until(page, lambda: documents.count() == 1)
    documents.first.click()
    page.get_by_role("region", name="Document 26").wait_for()
    first = labels(page, "document 26")
    assert len(first) == 2000
    page.get_by_role("navigation", name="Parts").get_by_role("button", name="Next").click()
    until(page, lambda: labels(page, "document 26") not in ([], first))
    page.locator(".token").first.hover()
    assert page.locator(".token-about").inner_text().startswith("token 2,001:")
    page.get_by_role("navigation", name="Documents").get_by_role("button", name="Previous").click()
    page.get_by_role("region", name="Document 25").wait_for()
    page.get_by_role("button", name="All documents").click()
    until(page, lambda: documents.count() == 1)


def test_a_data_set_that_is_deleted_meanwhile(folder: Path, tmp_path: Path, open_page: OpenPage) -> None:
    shutil.copytree(folder, tmp_path / "runs", symlinks=True)
    with running(page_app(tmp_path / "runs", {})) as url:
        page = open_page(url, tab="data", expect="400")
        page.get_by_role("radio", name="Documents").check()
        page.get_by_role("combobox", name="Data set").select_option("chat/train")
        page.locator(".document").first.wait_for()
        shutil.rmtree(tmp_path / "runs" / "chat")
        page.get_by_role("button", name="Next").click()
        page.get_by_role("alert").get_by_text("no data set 'chat/train'").wait_for()
        page.get_by_role("tab", name="Chat").click()
        page.get_by_role("tab", name="Data").click()
        until(page, lambda: "chat/train" not in page.get_by_role("combobox", name="Data set").inner_text())


@pytest.mark.parametrize("width", [WIDE, PHONE])
@pytest.mark.parametrize("dark", [False, True])
def test_it_can_be_read_by_all(url: str, folder: Path, open_page: OpenPage, width: int, dark: bool) -> None:
    page = open_page(url, tab="data", width=width, dark=dark)
    page.get_by_label("Compare with").select_option("bytes")
    until(page, lambda: page.locator(".token-view").count() == 2)
    page.locator(".token").nth(3).focus()
    for view in ("Tokenizer", "Rows", "Documents"):
        page.get_by_role("radio", name=view).check()
        page.locator(".token, .document").first.wait_for()
        expect_contrast(page)
        expect_names(page)
        expect_no_sideways_scroll(page)
        picture(page, f"data-{view.lower()}", whole=True)
    assert len(TokenShards.open(folder / "chat" / "data" / "train"))
