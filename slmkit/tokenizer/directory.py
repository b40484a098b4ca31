"""Reads and writes a tokenizer's directory: `tokenizer.json` and `tokenizer_config.json`, in Hugging Face's format.

The config says what the vocabulary's special tokens are for. Writing is atomic per file. The built-in chat templates
are here too, with their special tokens.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from slmkit.config import UserError, did_you_mean, kind_of_value, one_line, warn_once
from slmkit.files import write_whole
from slmkit.files.find import is_gpt2
from slmkit.tokenizer.byte_level import END_OF_TEXT, PADDING, SPECIALS, TURN_END, TURN_START, gpt2, is_byte_level
from slmkit.tokenizer.chat import CHAT_FORMATS

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
SENTENCEPIECE_FILE = "tokenizer.model"
TEMPLATES = Path(__file__).with_name("templates")
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
MORE_TOKENS = ("additional_special_tokens", "extra_special_tokens")  # transformers 4's name and 5's
FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")  # of an added token
GPT2: dict[str, Any] = {
    "tokenizer_class": "GPT2Tokenizer",
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "unk_token": END_OF_TEXT,
    "add_bos_token": False,
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
}


class Contents(NamedTuple):
    """Contents of a tokenizer's directory."""

    tokenizer: Tokenizer
    config: dict[str, Any]  # tokenizer_config.json without its chat template
    chat_template: str | None


def own_config() -> dict[str, Any]:
    """The `tokenizer_config.json` of a tokenizer trained here, for transformers 4 and 5."""
    flags = dict.fromkeys(FLAGS, False) | {"special": True}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(index): {"content": token, **flags} for index, token in enumerate(SPECIALS)},
        "eos_token": END_OF_TEXT,
        "pad_token": PADDING,
        "additional_special_tokens": [TURN_START, TURN_END],
        "clean_up_tokenization_spaces": False,
    }


def special_spellings(config: dict[str, Any]) -> dict[str, str]:
    """Spelling → key in the config, or '', of every token that the config calls special."""
    spellings = {}
    for entry in (config.get("added_tokens_decoder") or {}).values():
        if entry.get("special"):
            spellings[entry["content"]] = ""
    for key in MORE_TOKENS:
        more = config.get(key) or []
        spellings |= {_spelling(token): "" for token in (more.values() if isinstance(more, dict) else more)}
    return spellings | {token: key for key, token in named_tokens(config).items()}


def with_tokens(
    config: dict[str, Any], tokenizer: Tokenizer, added: Sequence[str], bos_token: str | None
) -> dict[str, Any]:
    """The config with further tokens, and with `bos_token` as beginning-of-text token unless that is None."""
    of_id = {token.content: (index, token) for index, token in tokenizer.get_added_tokens_decoder().items()}
    entries = {
        str(index): {"content": token.content} | {flag: getattr(token, flag) for flag in FLAGS}
        for index, token in (of_id[spelling] for spelling in added)
    }
    special = [spelling for spelling in added if of_id[spelling][1].special]
    key = next((key for key in MORE_TOKENS if isinstance(config.get(key), list)), MORE_TOKENS[0])
    more = {key: [*config.get(key, []), *special]} if special else {}
    begins = {"bos_token": bos_token} if bos_token else {}
    return config | {"added_tokens_decoder": config.get("added_tokens_decoder", {}) | entries} | more | begins


def bos_and_eos_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before a text [tokens] and after it [tokens].

    `add_bos_token` of the config has no effect with a `tokenizer.json`, as in `transformers`.
    """
    plain, whole = (tokenizer.encode("a", add_special_tokens=adds).ids for adds in (False, True))
    start = next(place for place in range(len(whole) + 1) if whole[place : place + len(plain)] == plain)
    return whole[:start], whole[start + len(plain) :]


def named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Tokens with a named role in the config: `{"eos_token": "<|endoftext|>", …}`."""
    return {key: _spelling(config[key]) for key in NAMED_TOKENS if config.get(key)}


def read(directory: str | Path) -> Contents:
    """Contents of a directory with a `tokenizer.json`; config and template are optional. `gpt2` is tiktoken's.

    Raises `UserError` with the path for a missing or invalid file.
    """
    directory = Path(directory)
    if is_gpt2(directory):
        return Contents(gpt2(), dict(GPT2), None)
    path = directory / TOKENIZER
    text = _read_text(path)
    if text is None:
        text = _read_text(path.with_name(f"{TOKENIZER}.gz"))
    if text is None and (directory / SENTENCEPIECE_FILE).is_file():
        raise UserError(
            f"{directory / SENTENCEPIECE_FILE}: SentencePiece's file is not read; write a {TOKENIZER} beside it with "
            f"transformers: AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"
        )
    if text is None:
        raise UserError(
            f"{path}: no such file; expected a directory that holds one, such as a model's or a tokenizer's"
        )
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain `Exception`
        raise UserError(
            f"{path}: not a readable tokenizer.json ({one_line(error)}); save or download it again"
        ) from None
    config = _read_config(directory / CONFIG)
    tokenizer = with_class_rules(tokenizer, config, named_tokens(config).get("bos_token", "<s>"))
    template = config.pop("chat_template", None)
    if isinstance(template, list):  # several named templates
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return Contents(tokenizer, config, _read_text(directory / TEMPLATE) or template)


def write(directory: str | Path, contents: Contents) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` atomically. Raises `UserError` if they cannot be written."""
    directory = Path(directory)
    config = dict(contents.config)
    if contents.chat_template is not None:
        config["chat_template"] = contents.chat_template
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / TOKENIZER, contents.tokenizer.to_str(pretty=True))
        write_whole(directory / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        # A template file left from an earlier tokenizer would take precedence over the config's.
        (directory / TEMPLATE).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: the tokenizer cannot be written here: {error.strerror or error}") from None


def _spelling(token: Any) -> str:
    """The spelling of a token: the string itself, or an object's `content`."""
    return token["content"] if isinstance(token, dict) else str(token)


def _read_config(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    if text is None:
        return {}
    try:
        config = json.loads(text)
        if not isinstance(config, dict):
            raise ValueError(f"expected an object, found {kind_of_value(config)}")
        special_spellings(config)  # reports a malformed entry with this path
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: cannot be read as a tokenizer's settings ({one_line(error)}); save or download it again"
        ) from None
    return config


def _read_text(path: Path) -> str | None:
    """The file's text, None if it does not exist. Raises `UserError` if it cannot be read."""
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except FileNotFoundError:
        return None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); save or download it again") from None


class ChatFormat(NamedTuple):
    """A template, the special tokens that it writes, and its beginning-of-text token."""

    template: str | None
    tokens: Sequence[str] = ()
    bos_token: str | None = None


FORMATS: dict[str, dict[str, Any]] = CHAT_FORMATS["formats"]


def find_format(name: str) -> ChatFormat:
    """The format `chatml`, `llama3` or `gemma`, or the one in a Jinja file, whose special tokens are unknown.

    Raises `UserError` for another name and for a file that cannot be read.
    """
    if name in FORMATS:
        return ChatFormat((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"), **FORMATS[name])
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"chat_template {name!r}: no file, and no template that comes with slmkit; {did_you_mean(name, FORMATS)}"
        )
    try:
        return ChatFormat(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a chat template: {error}") from None


# -- the class in the config ------------------------------------------------------------------------------------------

# transformers 5 builds some classes in its own way: of `tokenizer.json` it takes only the vocabulary, the merges and,
# mostly, the post-processor. The classes of language models are built here likewise; for any other class there is a
# warning that the ids may differ.
PLAIN = {"", "PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", "PythonBackend"}
SENTENCEPIECE = {"LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer"}
LETTERS = {"Qwen2Tokenizer": r"\p{L}", "Qwen3_5Tokenizer": r"\p{L}\p{M}"}
BYTE_LEVEL = {"GPT2Tokenizer", "GPTNeoXTokenizer", "CohereTokenizer", *LETTERS}
QWEN = (  # its pre-tokenizer pattern; LETTERS is replaced by the letters
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[LETTERS]+|\p{N}| ?[^\sLETTERS\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def with_class_rules(tokenizer: Tokenizer, config: dict[str, Any], bos_token: str) -> Tokenizer:
    """The tokenizer with the rules of the config's class; warns if they are unknown."""
    named = str(config.get("tokenizer_class") or "")
    name, spaced = named.removesuffix("Fast"), config.get("add_prefix_space")
    is_bpe, bytes_spelled = isinstance(tokenizer.model, models.BPE), is_byte_level(tokenizer)
    if name in BYTE_LEVEL and is_bpe and bytes_spelled:
        _byte_level(tokenizer, name, bool(spaced))
    elif name in SENTENCEPIECE and is_bpe and not bytes_spelled:
        _sentencepiece(tokenizer, name, spaced is not False, bool(config.get("legacy")))
    elif name == "T5Tokenizer" and isinstance(tokenizer.model, models.Unigram):
        _t5(tokenizer)
    elif named not in PLAIN and not (name == "LlamaTokenizer" and bytes_spelled):  # used as in the file
        warn_once(
            f"tokenizer_class {named!r}: transformers may build this class by rules of its own, and the ids used here "
            "are those of tokenizer.json as it stands; if they are right, set tokenizer_class to "
            "'PreTrainedTokenizerFast' in tokenizer_config.json"
        )
    begins = tokenizer.token_to_id(bos_token)
    if name == "CodeLlamaTokenizer" and begins is not None:  # replaces the file's post-processor
        pair = [bos_token, "$A", bos_token, "$B:1"]
        tokenizer.post_processor = processors.TemplateProcessing(pair[:2], pair, [(bos_token, begins)])
    return tokenizer


def _byte_level(tokenizer: Tokenizer, name: str, adds_space: bool) -> None:
    splits = pre_tokenizers.ByteLevel(adds_space, use_regex=name not in LETTERS)
    tokenizer.model.ignore_merges = False
    tokenizer.normalizer = None if name == "GPT2Tokenizer" else normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = splits, decoders.ByteLevel()
    if name in LETTERS:
        words = pre_tokenizers.Split(Regex(QWEN.replace("LETTERS", LETTERS[name])), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, splits])
    if name == "CohereTokenizer":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), splits])
    if name == "GPTNeoXTokenizer":
        tokenizer.post_processor = None


def _sentencepiece(tokenizer: Tokenizer, name: str, adds_space: bool, legacy: bool) -> None:
    """A space before the first word of a text and, if `legacy`, after special tokens; Gemma's has none."""
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if name == "GemmaTokenizer":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        scheme = ("always" if legacy and name == "LlamaTokenizer" else "first") if adds_space else "never"
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
        parts += [decoders.Strip(" ", 1, 0)] if adds_space or name == "CodeLlamaTokenizer" else []
    tokenizer.decoder = decoders.Sequence(parts)


def _t5(tokenizer: Tokenizer) -> None:
    content = json.loads(tokenizer.to_str())
    normalizer = content["normalizer"] or {}
    charts = [part for part in [normalizer, *normalizer.get("normalizers", [])] if part.get("type") == "Precompiled"]
    content |= {"normalizer": charts[0] if charts else None}
    content["model"] |= {"unk_id": 2, "byte_fallback": False}
    rebuilt = Tokenizer.from_str(json.dumps(content))
    spaces = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=True)
    tokenizer.model, tokenizer.normalizer = rebuilt.model, rebuilt.normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always", split=True)
    end = tokenizer.token_to_id("</s>")
    if end is not None:
        pair = ["$A", "</s>", "$B:1", "</s>:1"]
        tokenizer.post_processor = processors.TemplateProcessing(pair[:2], pair, [("</s>", end)])
