"""`slm generate`: many prompts and samples, prompts that are too long, constrained text, and what a terminal shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

from slmkit.generation.sampling import seed_of
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.model.config import SLMConfig
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from tests.cli.helpers import refused, slm
from tests.cli.terminal import Terminal
from tests.generation.helpers import TOKENIZER, Continuation, complete

CONTEXT = 128
CONFIG = SLMConfig(
    vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=CONTEXT, initializer_range=0.3,
)  # fmt: skip
SETTINGS = SamplingSettings(temperature=0.8, top_p=0.95, min_p=0.05)  # the command's own
TEXTS = ["Once there was a fox", "the owl", "A hen and a hat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    save_decoder(build_decoder(CONFIG, seed=1), CONFIG, folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    return folder


def alone(prompt: str | list[int], seed: int, most: int = 12) -> str:
    return alone_with_end(prompt, seed, most).text


def alone_with_end(prompt: str | list[int], seed: int, most: int = 12) -> Continuation:
    settings = SETTINGS.model_copy(update={"seed": seed})
    decoder = build_decoder(CONFIG, seed=1).eval()
    return complete(decoder, TOKENIZER, prompt, settings=settings, max_new_tokens=most)


def test_samples_are_numbered_differ_and_come_again_under_a_seed(folder: Path) -> None:
    words = ("generate", "model", TEXTS[0], "-n", "3", "--seed", "5", "--max-new-tokens", "12")
    done = slm(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    texts = [TEXTS[0] + alone(TEXTS[0], seed_of(5, number)) for number in range(3)]
    assert done.stdout == "".join(f"--- sample {number} of 3\n{text}\n" for number, text in enumerate(texts, 1))
    assert len(set(texts)) == 3
    assert done.stderr == "", "speed is for terminals"


@pytest.mark.parametrize("is_piped", [False, True])
def test_prompts_one_a_line(folder: Path, tmp_path: Path, is_piped: bool) -> None:
    lines = f"{TEXTS[0]}\n\n{TEXTS[1]}\r\n{TEXTS[2]}"
    (tmp_path / "prompts.txt").write_text(lines)
    given = ("--prompts", "-") if is_piped else ("--prompts", tmp_path / "prompts.txt")
    words = ("generate", "model", *given, "--seed", "5", "--max-new-tokens", "12")
    done = slm(*words, "-o", tmp_path / "texts.jsonl", cwd=folder, stdin=lines if is_piped else "")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["text"]) for row in rows] == [(text, alone(text, 5)) for text in TEXTS]
    assert all(row.keys() == {"prompt", "text", "finish_reason", "tokens"} for row in rows)
    ends = [alone_with_end(text, 5) for text in TEXTS]
    assert [(row["finish_reason"], row["tokens"]) for row in rows] == [(end.finish_reason, end.tokens) for end in ends]
    assert done.stdout == f"3 texts in {tmp_path / 'texts.jsonl'}\n"
    printed = slm(*words, "-n", "2", cwd=folder, stdin=lines if is_piped else "").stdout
    assert re.findall(r"^--- (.*)$", printed, re.M) == [
        f"prompt {p} of 3, sample {s} of 2" for p in "123" for s in "12"
    ]
    assert all(f"sample 1 of 2\n{text}{alone(text, 5)}\n" in printed for text in TEXTS)


@pytest.mark.parametrize("is_piped", [False, True])
@pytest.mark.parametrize("content", ["Fox [1]\n[2] owl\n", '{"prompt": "Fox [1]"}\n{"prompt": "[2] owl"}\n'])
def test_a_byte_order_mark_is_no_part_of_the_first_prompt(
    folder: Path, tmp_path: Path, content: str, is_piped: bool
) -> None:
    (tmp_path / "p").write_text("\ufeff" + content)
    given = "-" if is_piped else tmp_path / "p"
    words = ("generate", "model", "--prompts", given, "--max-new-tokens", "3", "--seed", "5", "-o", "-")
    done = slm(*words, cwd=folder, stdin="\ufeff" + content)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["prompt"] for line in done.stdout.splitlines()] == ["Fox [1]", "[2] owl"]
    one = slm("generate", "model", "-", "--max-new-tokens", "3", "--seed", "5", cwd=folder, stdin="\ufeffFox [1]\n")
    assert one.stdout == f"Fox [1]{alone('Fox [1]', 5, 3)}\n"


@pytest.mark.parametrize("place", ["-", "/dev/stdout"])
def test_standard_output_gets_lines_of_json_and_nothing_else(folder: Path, tmp_path: Path, place: str) -> None:
    words = ("generate", "model", TEXTS[0], "-n", "2", "--seed", "5", "--max-new-tokens", "12", "-o", place)
    done = slm(*words, cwd=folder)  # a regular file that exists
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["text"] for row in rows] == [alone(TEXTS[0], seed_of(5, number)) for number in range(2)]
    assert done.stderr == ""


def test_a_long_job_shows_how_far_it_is_and_what_was_written_when_it_is_stopped(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p").write_text("fox\n" * 2000)
    words = ("generate", folder / "model", "--prompts", "p", "-o", "texts.jsonl", "--max-new-tokens", "60")
    terminal = Terminal(*words, cwd=tmp_path, columns=100)
    shown = terminal.wait_for(" of 2,000 texts, ")
    assert re.search(r"generating .*\d of 2,000 texts, [\d,]+ tokens?", shown)
    while not (tmp_path / "texts.jsonl").read_text():
        terminal.wait_for("generating")
    terminal.type("\x03")
    said = terminal.wait_for("are in texts.jsonl")
    assert terminal.leave("") == 130
    written = len((tmp_path / "texts.jsonl").read_text().splitlines())
    assert 0 < written < 2000
    assert f"\n{written:,} of 2,000 texts are in texts.jsonl" in said


def test_prompts_as_json_keep_their_other_keys(folder: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Who?\u2028You?"}]
    given = [{"id": 7, "prompt": "two\nlines"}, {"messages": messages, "kind": "chat"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in given))
    words = ("generate", "model", "--prompts", tmp_path / "p.jsonl", "-n", "2", "--seed", "5", "--max-new-tokens", "12")
    done = slm(*words, "-o", tmp_path / "out.jsonl", cwd=folder)
    assert done.returncode == 0, done.stderr
    asked = TOKENIZER.encode_chat(messages, add_generation_prompt=True).ids
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().split("\n")[:-1]]
    assert [(row["sample"], row["text"]) for row in rows] == [
        (number + 1, alone(prompt, seed_of(5, number))) for prompt in ("two\nlines", asked) for number in range(2)
    ]
    assert [row["id"] for row in rows[:2]] == [7, 7]
    assert all(row["messages"] == messages and row["kind"] == "chat" for row in rows[2:])
    assert "exists: name another file" in refused(*words, "-o", tmp_path / "out.jsonl", cwd=folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("\n \n", "p: there is no prompt in it"),
        ('{"prompt": "a"}\nb\n', "p:2: not a JSON object, as the first line is"),
        ('\n{"text": "a"}\n', 'p:2: expected {"prompt"'),
        ('{"prompt": "a", "messages": []}\n', 'p:1: expected {"prompt"'),
        ('{"prompt": "a"}\n[1]\n', 'p:2: expected {"prompt"'),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', "p:1: message 1"),
        ('[{"prompt": "a"}]', "p:1: a JSON list: expected one object a line"),
        ('\n[\n{"prompt": "a"}]', "p:2: a JSON list"),
        ('["a", "b"]', "p:1: a JSON list"),
        ('{"prompt": "a"}\n{"prompt": "a\\ud800"}\n', "p:2: not text: 'utf-8' codec can't encode character"),
        ('{"prompt": "a", "id": ["\\udc00"]}\n', "p:1: not text"),
        (f'{{"prompt": "a", "id": {"[" * 100_000}', "p:1: not a JSON object"),
        ('{"prompt": "a"}\n{"prompt": "b", "text": ""}\n', "p:2: --output would overwrite the key 'text': rename it"),
        ('{"prompt": "a", "tokens": 1, "sample": 1}\n', "p:1: --output would overwrite the key 'sample'"),
        ('{"prompt": "a", "finish_reason": "stop"}\n', "p:1: --output would overwrite the key 'finish_reason'"),
        ("a\udcff", "p: not UTF-8 text: 'utf-8' codec"),
        (
            "a\n" + "x" * (CONTEXT - 1),
            f"p:2: {CONTEXT} tokens, which fills the model's context of {CONTEXT}: shorten it, or ",
        ),
    ],
)
def test_a_file_without_usable_prompts(folder: Path, tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "p").write_text(content, errors="surrogateescape")
    assert words in refused("generate", folder / "model", "--prompts", "p", "-o", "out", cwd=tmp_path)
    assert not (tmp_path / "out").exists()


def test_options_that_exclude_each_other(folder: Path) -> None:
    assert "give one of them" in refused("generate", "model", "x", "--prompts", "p", cwd=folder)
    assert "give one of them" in refused("generate", "model", "--regex", "x", "--choice", "y", cwd=folder)
    assert "none.txt: no such file" in refused("generate", "model", "--prompts", "none.txt", cwd=folder)
    assert "none.json: no such file" in refused("generate", "model", "--json-schema", "none.json", cwd=folder)


@pytest.mark.parametrize(("most", "kept"), [(12, CONTEXT - 12), (100, CONTEXT // 2)])
def test_of_a_prompt_that_is_too_long_the_end_is_kept(folder: Path, most: int, kept: int) -> None:
    prompt = "".join(chr(97 + number % 26) for number in range(300))
    words = ("generate", "model", prompt, "--seed", "5", "--max-new-tokens", most)
    assert f"301 tokens, which fills the model's context of {CONTEXT}" in refused(*words, cwd=folder)
    done = slm(*words, "--crop", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert f"the prompt: its first {301 - kept} of 301 tokens are left out" in done.stderr
    assert done.stdout == prompt + alone([*TOKENIZER.beginning, *TOKENIZER.encode(prompt)[1 - kept :]], 5, most) + "\n"
    half = slm("generate", "model", "x" * 30, "--crop", "--max-new-tokens", "100", "--seed", "5", cwd=folder)
    assert half.stdout.startswith("x" * 30)
    assert "left out" not in half.stderr, "there is nothing to leave out"
    short = slm("generate", "model", "short", "--crop", "--max-new-tokens", "12", "--seed", "5", cwd=folder)
    assert (short.stdout, short.stderr) == (f"short{alone('short', 5)}\n", "")


def test_a_conversation_that_is_too_long_loses_its_oldest_messages(folder: Path, tmp_path: Path) -> None:
    old = [{"role": "user", "content": "x" * 90}, {"role": "assistant", "content": "y"}]
    new = [{"role": "user", "content": "Who?"}]
    (tmp_path / "p").write_text(json.dumps({"messages": old + new}) + "\n")
    words = ("generate", "model", "--prompts", tmp_path / "p", "--seed", "5", "--max-new-tokens", "12")
    assert "which fills the model's context" in refused(*words, cwd=folder)
    done = slm(*words, "--crop", cwd=folder)
    assert done.returncode == 0, done.stderr
    asked = TOKENIZER.encode_chat(new, add_generation_prompt=True).ids
    assert done.stdout == f"Who?\n{alone(asked, 5)}\n"


def test_constrained_text(folder: Path, tmp_path: Path) -> None:
    schema = {
        "type": "object", "required": ["name", "tame"], "additionalProperties": False,
        "properties": {"name": {"enum": ["fox", "owl"]}, "tame": {"type": "boolean"}},
    }  # fmt: skip
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    for option, value in (("--json-schema", tmp_path / "schema.json"), ("--regex", "[a-c]{2,4}!"), ("--choice", "hat")):
        more = ("--choice", "kite") if option == "--choice" else ()
        done = slm("generate", "model", "-n", "4", option, value, *more, cwd=folder)
        assert done.returncode == 0, done.stderr
        texts = done.stdout.splitlines(keepends=True)  # alone, for programs that read them
        assert len(texts) == 4
        for text in texts:
            if option == "--json-schema":
                jsonschema.validate(json.loads(text), schema)
            else:
                assert re.fullmatch("[a-c]{2,4}!\n" if option == "--regex" else "(hat|kite)\n", text)
    cut = slm("generate", "model", "--regex", "[a-c]{9}", "--max-new-tokens", "4", cwd=folder)
    assert cut.stderr == "note: the text is cut after 4 tokens: --max-new-tokens allows more\n"
    alone = slm("generate", "model", "A fox", "--choice", "hat", cwd=folder)
    assert alone.stdout == "hat\n", "the prompt is not glued before it"
    assert "regex" in refused("generate", "model", "--regex", "(", cwd=folder)
    assert "--regex: expected a regular expression that is not empty" in refused(
        "generate", "model", "--regex", "", cwd=folder
    )
    assert "give one of them" in refused("generate", "model", "--regex", "", "--choice", "y", cwd=folder)
    (tmp_path / "schema.json").write_text('\ufeff{"const": 5}')
    assert slm("generate", "model", "--json-schema", tmp_path / "schema.json", cwd=folder).stdout == "5\n"
    (tmp_path / "schema.json").write_text("[" * 100_000)
    assert "schema.json: JSON that is nested too deeply" in refused(
        "generate", "model", "--json-schema", tmp_path / "schema.json", cwd=folder
    )
    (tmp_path / "schema.json").write_text('{"type": "nothing"}')
    assert "nothing" in refused("generate", "model", "--json-schema", tmp_path / "schema.json", cwd=folder)
    (tmp_path / "schema.json").write_text("{")
    assert "schema.json" in refused("generate", "model", "--json-schema", tmp_path / "schema.json", cwd=folder)


def test_every_option_of_sampling_reaches_the_sampler(folder: Path) -> None:
    options = {
        "temperature": 1.5, "top_k": 7, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.7, "repetition_penalty": 1.2,
        "presence_penalty": 0.5, "frequency_penalty": 0.25,
    }  # fmt: skip
    given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    done = slm("generate", "model", "fox", *given, "--seed", "3", "--max-new-tokens", "40", cwd=folder)
    assert done.returncode == 0, done.stderr
    settings = SamplingSettings(**options, seed=3)
    said = complete(build_decoder(CONFIG, seed=1).eval(), TOKENIZER, "fox", settings=settings, max_new_tokens=40).text
    assert done.stdout == f"fox{said}\n"
    assert "--presence-penalty: expected" in refused("generate", "model", "x", "--presence-penalty", "3", cwd=folder)


def test_a_terminal_shows_no_control_characters_and_the_speed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p").write_text("red\x1b[31m\t\x07\nplain\n")
    words = ("generate", folder / "model", "--prompts", "p", "--max-new-tokens", "5", "--seed", "1")
    terminal = Terminal(*words, cwd=tmp_path)
    try:
        shown = terminal.wait_for("tokens/s")
        assert re.search("red␛\\[31m +␇", shown)
        assert "--- prompt 2 of 2\nplain" in shown
        assert re.search(r"\n10 tokens, [\d,.]+ tokens/s", shown)
        assert b"\x1b[31m" not in terminal.raw
        assert b"\x1b[2mplain" in terminal.raw, "the prompt is dim"
    finally:
        assert terminal.leave("") == 0
    plain = Terminal(*words, cwd=tmp_path, NO_COLOR="1")
    plain.wait_for("tokens/s")
    assert plain.leave("") == 0
    assert not re.search(rb"\x1b\[[0-9;]*m", plain.raw)
    assert "red\x1b[31m\t\x07" in slm(*words, cwd=tmp_path).stdout, "a file gets the text as it is"


def test_guesses_do_not_change_a_greedy_text(folder: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"num_hidden_layers": 1})
    save_decoder(build_decoder(config, seed=2), config, tmp_path / "small")
    TOKENIZER.save_pretrained(tmp_path / "small")
    words = ("generate", "model", TEXTS[0], "--temperature", "0", "--max-new-tokens", "60")
    plain = slm(*words, cwd=folder)
    for more in (["--lookup"], ["--draft", str(tmp_path / "small")]):
        done = slm(*words, *more, cwd=folder)
        assert (done.returncode, done.stdout) == (0, plain.stdout), done.stderr
    assert "--draft and --lookup: give one of them" in refused(
        "generate", "model", "--lookup", "--draft", "model", cwd=folder
    )


def test_what_is_refused_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"vocab_size": 300})
    save_decoder(build_decoder(config, seed=2), config, tmp_path / "wide")
    TOKENIZER.save_pretrained(tmp_path / "wide")
    output = tmp_path / "o.jsonl"
    words = ("generate", "model", "-o", output, "--temperature", "0")
    assert "300 logits, where model has 260" in refused(*words, "--draft", str(tmp_path / "wide"), cwd=folder)
    assert not output.exists()
    done = slm(*words, "--max-new-tokens", "3", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert len(output.read_text().splitlines()) == 1
