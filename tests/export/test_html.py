"""The HTML page in a real Chromium: its ids, log-probabilities and text are slmkit's."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, normalizers, pre_tokenizers

from slmkit.adapt.load import load_model
from slmkit.config import UserError
from slmkit.export import html
from slmkit.export.compare import EXACT, Probe, compare, probe_strings
from slmkit.export.html import HtmlPage, write_html
from slmkit.export.runtimes import Slmkit, load
from slmkit.model.config import SLMConfig
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer
from tests.long import several
from tests.serving.browser import chromium, expect_contrast, expect_names, expect_no_sideways_scroll, picture, until
from tests.tokenizer.kinds import MADE, byte_level, directory_of

__all__ = ["chromium"]  # a fixture
Make = Callable[..., Path]
WINDOWS = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LATENT = {"kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5, "num_key_value_heads": 4}
GROUPED = {"num_key_value_heads": 2}
# One or two of each family, so that each choice of the architecture occurs.
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"hidden_act": "gelu_new"},
    "llama": GROUPED | {"rope_parameters": LLAMA3 | {"rope_theta": 1e4, "original_max_position_embeddings": 64}},
    "llama-biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 6, "hidden_act": "gelu"},
    "llama-dynamic": {
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "dynamic", "factor": 6.0, "rope_theta": 1e4},
    },
    "mistral": GROUPED | {"sliding_window": 7, "rope_parameters": YARN | {"rope_theta": 1e4}},
    "qwen2": WINDOWS,
    "qwen3": {"num_key_value_heads": 1, "head_dim": 24},
    "smollm3": GROUPED | {"no_rope_layers": [1, 0]},
    "olmo2": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "olmo3": WINDOWS,
    "gemma2": WINDOWS | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": GROUPED | {
        "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    },
    "deepseek_v3": LATENT,
    "deepseek_v3-compressed": LATENT | {"q_lora_rank": 9, "rope_interleave": True},
    "slm": {
        "norm": "layer", "norm_at": "both", "gated_mlp": False, "qk_norm": "width", "sliding_window": 1,
        "hidden_act": "relu2",
    },
}  # fmt: skip
TEXT = "Once upon a time there was a cat. It's 12345 o'clock!"


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make("llama", seed=…, tokenizer=…, **settings)` → a model directory with random weights."""

    def made(name: str = "llama", tokenizer: Path | None = None, **settings: Any) -> Path:
        directory = tokenizer or tmp_path_factory.mktemp(name)
        if tokenizer is None:
            plain = SLMTokenizer(320)
            plain.train([TEXT])
            plain.save_pretrained(directory)
        rows = len(SLMTokenizer.from_pretrained(directory)) + 3  # of which some have no token
        sizes = {
            "model_type": name.split("-")[0], "vocab_size": rows, "hidden_size": 32,
            "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 400,
        }  # fmt: skip
        config = SLMConfig(**sizes | MODELS.get(name, {}) | settings)
        decoder = build_decoder(config, seed=5)
        for parameter in decoder.parameters():  # so large that a wrong order of rows or a wrong angle is seen
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.15
        save_decoder(decoder, config, directory)
        return directory

    return made


def reference(directory: Path) -> Slmkit:
    return Slmkit(load_model(directory)[0].eval(), SLMTokenizer.from_pretrained(directory), 0)


# What those that are left out have, others have too: windows, biases, norms of heads and behind a block.
LEFT_OUT = several({"qwen2", "qwen3", "olmo2"}, set[str]())


@pytest.mark.parametrize("name", [name for name in MODELS if name not in LEFT_OUT])
def test_a_page_predicts_what_slmkit_does(name: str, make: Make, chromium: Any, tmp_path: Path) -> None:
    model = make(name)
    write_html(load(model, tmp_path / "whole"), tmp_path / "page.html", "f32")
    ours = reference(model)
    ids = torch.randint(260, (130,), generator=torch.Generator().manual_seed(1)).tolist()
    lengths = [
        1,
        2,
        7,
        8,
        9,
        30,
        63,
        64,
        65,
        66,
        129,
        130,
    ]  # around windows, original contexts and what is read at once
    start, talk = ours.tokenizer.encode_prompt(TEXT), [{"role": "user", "content": " Where?\n"}]
    talk = [*talk, {"role": "assistant", "content": "Here "}, *talk]
    count = 256 if name in ("gpt2", "llama") else 48
    probe = Probe([TEXT], frozenset(), [talk[:1], talk], [], [], [(ids, lengths)], start, count)
    with HtmlPage(tmp_path / "page.html", chromium) as page:
        assert page.checked["equal"], page.checked
        assert page.checked["webassembly"]
        parity = compare(ours, page, probe, EXACT)
    assert parity.passed, parity.failures


@pytest.mark.parametrize("kind", ["f16", "int8", "int4"])
def test_rounded_weights_are_as_in_python_and_close_to_the_model(
    kind: str, make: Make, chromium: Any, tmp_path: Path
) -> None:
    model = make("slm", hidden_size=48, head_dim=10)
    write_html(load(model, tmp_path / "whole"), tmp_path / "page.html", kind)
    ours, ids = reference(model), [*range(7, 60)]
    with HtmlPage(tmp_path / "page.html", chromium) as page:
        assert page.checked["equal"], page.checked
        apart = abs(page.log_probs(ids, [1, 20, 53]) - ours.log_probs(ids, [1, 20, 53])).max()
    assert 1e-6 < apart < {"f16": 0.05, "int8": 0.5, "int4": 5}[kind]


def test_a_browser_without_webassembly_computes_the_same(make: Make, chromium: Any, tmp_path: Path) -> None:
    model = make("gemma2", max_position_embeddings=80)
    for kind in html.KINDS:
        write_html(load(model, tmp_path / "whole"), tmp_path / "page.html", kind)
        with HtmlPage(tmp_path / "page.html", chromium) as page:
            expected = page.log_probs([*range(40)], [1, 40])
            page.page.goto((tmp_path / "page.html").as_uri() + "?kernels=javascript")
            checked = page._call("ready")
            assert (checked["webassembly"], checked["equal"]) == (False, True)
            assert abs(page.log_probs([*range(40)], [1, 40]) - expected).max() < 1e-4


LLAMA_BPE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Text that JavaScript's own \w, \s and case folding read differently; and halves of surrogate pairs.
ODD = [
    "I'LL 'll 'S ſ 'ſ \u212a'", "a\u00a0b\u00a0\u00a0c", "\r\n\r\n x\r\ny\r", "e\u0301\u0302 a\u0301b A\u030a\u0323",
    "\ufeffx\ufeff", "\x85y \x85",
    "\x1c \x1f", "\u180e x", "\ud800 x", "x\udfffy \ud83d", "  \ud800\ud801 hi", "\udc00world foo\udc00 bar",
    "__proto__ constructor",
    "\U0001f468\u200d\U0001f680", "</script><!--", "ǅ İ ß ẞ", "word_ x1y2", "١٢٣ Ⅷ½", "\x00",
]  # fmt: skip


@pytest.fixture(scope="module")
def strings() -> list[str]:
    return [text[:20] for text in probe_strings((), 10_000)]


def split_by(pattern: str) -> Any:
    """Byte-level BPE, with words split by a pattern."""
    tokenizer, config = byte_level()()
    tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    return tokenizer, config


@pytest.mark.parametrize(
    "kind", ["byte-level", "llama-bpe", "gemma-like", "words", "metaspace-first", "byte-level-words"]
)
def test_ids_are_those_of_python(
    kind: str, make: Make, strings: list[str], chromium: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MADE, "llama-bpe", partial(split_by, LLAMA_BPE))
    monkeypatch.setitem(MADE, "words", partial(split_by, r"\w+|\d|[^\w\s]|\s|(?i:[skfi]|ve)"))
    model = make("llama", directory_of(kind, tmp_path))
    write_html(load(model, tmp_path / "whole"), tmp_path / "page.html", "int8")
    tokenizer = SLMTokenizer.from_pretrained(model)
    spellings = [*tokenizer.special_tokens, *tokenizer.added_words]
    strings = strings if kind in ("byte-level", "llama-bpe", "gemma-like") else strings[:1000]
    texts = [*ODD, *strings, *(f"{text}{one} {one}{text}" for one, text in zip(spellings * 40, strings))]
    with HtmlPage(tmp_path / "page.html", chromium) as page:
        assert page.checked["equal"], page.checked
        assert [page.encode(text) for text in ODD] == [tokenizer.encode(text) for text in ODD]
        found = page._call("encodeAll", texts)
    wrong = [text for text, ids in zip(texts, found) if ids != tokenizer.encode(text)]
    assert not wrong, f"{len(wrong)}, such as {min(wrong, key=len)!a}"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.BertPreTokenizer()), "BertPreTokenizer"),
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Split(Regex(r"\s++x"), "isolated")), r"\++"),
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Split(Regex(r"[a&&b]"), "isolated")), "&"),
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Split(Regex("(?i:ust)"), "isolated")), "'t'"),
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Split(Regex(r"\p{Cherokee}"), "isolated")), "Cherokee"),
        (lambda t: setattr(t, "normalizer", normalizers.BertNormalizer()), "BertNormalizer"),
    ],
)
def test_a_tokenizer_that_javascript_would_read_differently_is_refused_by_name(
    change: Callable[[Any], None], named: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, config = byte_level()()
    change(tokenizer)
    monkeypatch.setitem(MADE, "odd", lambda: (tokenizer, config))
    model = make("llama", directory_of("odd", tmp_path))
    with pytest.raises(UserError, match=named) as error:
        write_html(load(model, tmp_path / "whole"), tmp_path / "page.html", "int8")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "page.html").exists()


def opened(chromium: Any, path: Path, width: int = 1280, dark: bool = False) -> Any:
    """The page as by a double click; the problems that it meets and the requests that it makes are in `.problems`."""
    page = chromium.new_page(
        viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light", reduced_motion="reduce"
    )
    page.problems = []
    page.on("console", lambda message: message.type == "error" and page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: request.url.startswith("blob:") or page.problems.append(request.url))
    page.goto(path.as_uri())
    page.locator("#send:enabled").wait_for()
    page.problems.remove(path.as_uri())
    return page


def said(page: Any, text: str, **settings: str) -> list[str]:
    """The tokens that the model adds to a text or says to a message, through the page's controls."""
    page.locator("#settings").evaluate("settings => settings.open = true")
    for field, value in settings.items():
        page.fill(f"#{field}", value)
    page.fill("#text", text)
    page.keyboard.press("Tab")  # from the text to the button
    page.keyboard.press("Enter")
    page.locator("#stop").wait_for(state="hidden")
    page.locator("#send:visible").wait_for()
    return page.locator(".turn.model").last.locator(".token").all_text_contents()


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_a_conversation_by_hand(width: int, dark: bool, make: Make, chromium: Any, tmp_path: Path) -> None:
    write_html(load(make("qwen3"), tmp_path / "whole"), tmp_path / "page.html", "int8")
    page = opened(chromium, tmp_path / "page.html", width, dark)
    assert page.locator("#checked").text_content() == "checked: equal to slmkit"
    first = said(page, "a <b>cat</b>", tokens="12", seed="3")
    assert page.locator(".turn.user").text_content() == "a <b>cat</b>"
    assert page.locator("main b").count() == 0
    page.locator("#clear").click()
    assert said(page, "a <b>cat</b>", tokens="12", seed="3") == first  # the same seed, the same text
    said(page, "and then?")  # after an answer
    page.locator(".turn.model").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#details").is_visible()
    assert page.locator("#details li").count() >= 8
    expect_no_sideways_scroll(page)
    expect_names(page)
    expect_contrast(page)
    picture(page, "html-page")
    page.keyboard.press("Escape")
    assert page.locator("#details").is_hidden()
    assert page.problems == []
    page.close()


def test_a_text_is_continued_and_every_end_token_stops_it(make: Make, chromium: Any, tmp_path: Path) -> None:
    model = make("llama")
    ours = reference(model)
    said_by_us = ours.greedy(ours.tokenizer.encode_prompt("the cat"), 12)
    end = next(token for token in said_by_us[4:] if token not in said_by_us[:4])
    config = {"eos_token_id": [ours.tokenizer.eos_token_id, end]}
    (model / "generation_config.json").write_text(json.dumps(config))
    write_html(load(model, tmp_path / "whole"), tmp_path / "page.html", "f32")
    page = opened(chromium, tmp_path / "page.html")
    page.locator("#settings").evaluate("settings => settings.open = true")
    page.check("#continue")
    tokens = said(page, "the cat", temperature="0", tokens="40")
    assert len(tokens) == said_by_us.index(end) + 1
    assert "Ended" not in page.locator(".turn.model").text_content()
    assert page.problems == []
    page.close()


def test_what_a_model_contains_is_data(make: Make, chromium: Any, tmp_path: Path) -> None:
    """Tokens and a template that spell HTML; messages that spell special tokens."""
    evil = "</script><script>document.title='evil'</script>"
    directory = tmp_path / "<img src=x onerror=alert(1)>"
    plain = SLMTokenizer(300)
    plain.train([TEXT])
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (tmp_path / "template.jinja").write_text(f"{evil}{template}<|im_start|>assistant\n")
    added = plain.extended(str(tmp_path / "template.jinja"), added_tokens=[evil, "<!--"])
    added.save_pretrained(directory)
    write_html(load(make("llama", directory), tmp_path / "whole"), tmp_path / "page.html", "int8")
    tokenizer = SLMTokenizer.from_pretrained(directory)
    with HtmlPage(tmp_path / "page.html", chromium) as page:
        assert page.checked["equal"]
        assert page.page.title().startswith("<img src=x")
        assert page.encode(f"a{evil}b<!--") == tokenizer.encode(f"a{evil}b<!--")
        for text in ("hello", "<|im_end|> x <|im_start|>user", "<|im_", f"{evil} \n", "<|endoftext|>", "\ud800 x"):
            talk = [{"role": "user", "content": text}]
            talk += [{"role": "assistant", "content": f"x {text}"}, {"role": "user", "content": "y"}]
            for messages in (talk[:1], talk, [{"role": "system", "content": text}, *talk]):
                assert page.encode_chat(messages) == tokenizer.encode_chat_prompt(messages)


def test_characters_come_whole(make: Make, chromium: Any, tmp_path: Path) -> None:
    """Byte tokens, of which several make one character, are shown when it is complete."""
    write_html(load(make("llama"), tmp_path / "whole"), tmp_path / "page.html", "int8")
    page = opened(chromium, tmp_path / "page.html")
    pieces = page.evaluate(
        """() => new Promise((resolve) => {
            const test = `;{ const stream = new TextStream(); const add = (byte) => stream.add(Uint8Array.of(byte));
                postMessage([...[...utf8.encode('é猫🐈')].map(add), add(0xe7), stream.end()]); }`;
            const parts = [document.getElementById('engine').textContent, test];
            new Worker(URL.createObjectURL(new Blob(parts))).onmessage = ({data}) => resolve(data);
        })"""
    )
    assert pieces == ["", "é", "", "", "猫", "", "", "", "🐈", "", "\ufffd"]
    page.close()


def test_a_larger_model_and_what_does_not_fit_are_refused_in_one_line(make: Make, tmp_path: Path) -> None:
    model, page = make("llama"), tmp_path / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "MOST_PARAMETERS", 1000)
        with pytest.raises(UserError, match=r"parameters; an HTML page has at most 1,000: use --to gguf") as error:
            write_html(load(model, tmp_path / "whole"), page, "int8")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no rows for the tokenizer's ids 261 to 261"):
        write_html(load(make("llama", vocab_size=261), tmp_path / "whole"), page, "int8")
    for value, kind, words in ((7e4, "f16", "beyond float16"), (float("nan"), "int8", "not finite")):
        decoder, config = load_model(model)
        decoder.blocks[0].mlp.up.weight.data[3, 3] = value
        save_decoder(decoder, config, model)
        with pytest.raises(UserError, match=words):
            write_html(load(model, tmp_path / "whole"), page, kind)
    assert not page.exists()


def test_a_page_that_computes_something_else_says_so(make: Make, chromium: Any, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_html(load(make("llama"), tmp_path / "whole"), path, "int8")
    text = path.read_text()
    path.write_text(text.replace("b * cosine + a * sine", "b * cosine - a * sine"))
    with pytest.raises(UserError, match=r"page.html: the page's own check fails: log-probabilities differ by"):
        HtmlPage(path, chromium)
    (tmp_path / "other.html").write_text("<p>hello</p>")
    with pytest.raises(UserError, match=r"other.html: the page's own check fails: it has none"):
        HtmlPage(tmp_path / "other.html", chromium)
    page = chromium.new_page()
    page.goto(path.as_uri())
    until(page, "!document.getElementById('send').disabled", 60)
    assert page.locator("#checked").text_content().startswith("Warning: this browser computes something else")
    page.close()


def test_a_damaged_page_or_another_one_is_an_error_of_one_line(make: Make, chromium: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_html(load(make(), tmp_path / "whole"), page, "int8")
    whole = page.read_text()
    middle = whole.rindex('class="weights">') + 100
    for damaged in ("", "<h1>mine</h1>", whole[: len(whole) // 2], f"{whole[:middle]}?{whole[middle + 1 :]}"):
        page.write_text(damaged)
        with pytest.raises(UserError, match=r"page\.html: the page's own check fails: ") as refused:
            HtmlPage(page, chromium)
        assert "\n" not in str(refused.value)
