"""A tokenizer in a GGUF: its tokens, how text is split and merged, its chat template and the tokens that end a text.

llama.cpp has code of its own for each way to split text, and a file names one (`tokenizer.ggml.pre`; llama.cpp's
src/llama-vocab.cpp). A splitting that llama.cpp does not have is refused: under the name of another one, text would get
other ids without an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer, models

from slmkit.config import UserError
from slmkit.export.gguf_types import TABLES
from slmkit.model.config import SLMConfig
from slmkit.tokenizer import SLMTokenizer, byte_level, chat_prompt
from slmkit.tokenizer.directory import CONFIG, LETTERS, QWEN
from slmkit.tokenizer.tokenizer import ENDS_OF_TEXT

if TYPE_CHECKING:
    import gguf

Content = Mapping[str, Any]  # of a tokenizer.json

# -- how llama.cpp splits text ----------------------------------------------------------------------------------------

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2, QWEN35 = (QWEN.replace("LETTERS", LETTERS[name]) for name in ("Qwen2Tokenizer", "Qwen3_5Tokenizer"))
QWEN2 = QWEN2.replace(r"[\p{L}]", r"\p{L}")  # as Qwen's file has it
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Without gpt-4o and tekken, which llama.cpp follows only roughly: text in Indic scripts gets other ids there.
# llama.cpp's name → the regular expressions that cut the text one after the other, and whether a word that is a token
# is taken whole, without merges (`ignore_merges`).
PRE: dict[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((GPT2,), False),
    "smollm": ((r"\p{N}", GPT2), False),
    "llama-bpe": ((LLAMA3,), True),
    "dbrx": ((LLAMA3,), False),
    "qwen2": ((QWEN2,), False),
    "qwen35": ((QWEN35,), False),
    "deepseek-v3": ((r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", DEEPSEEK3), False),
}
RAW = "sarvam-moe"  # merges by rank, as for the others, of the characters themselves; a space is `▁`
FILL: dict[str, str] = TABLES["fill"]
KNOWN_ENDS = {*TABLES["ends"].split()}


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: SLMTokenizer, directory: Path, rows: int) -> None:
    """Write the tokenizer's metadata. `directory`: the model's; `rows`: of its embedding.

    Raises `UserError` for a tokenizer that llama.cpp does not have, and for ids without a row.
    """
    library, generation = tokenizer._tokenizer, SLMConfig.from_pretrained(directory).for_generation()
    content = json.loads(library.to_str())
    texts, types = _tokens(tokenizer, library, rows)
    try:
        _check_added(tokenizer, library)
        if not byte_level.holds_every_byte(library):
            raise ValueError(f"{content['model']['type']} without a token for each byte")
        if byte_level.is_byte_level(library):
            model, pre, scores, begins = "gpt2", _byte_level_pre(content), None, False
        else:
            model, pre, scores, begins = _sentencepiece(content, texts, types)
        ends = _ends(tokenizer, generation)
    except ValueError as error:
        raise UserError(f"{directory}: llama.cpp does not have this tokenizer: {error}") from None
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    if scores is None:
        # A part with a space is never in a text that is split, and llama.cpp cuts a pair at its space.
        writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"] if " " not in "".join(pair)])
    else:
        writer.add_token_scores(scores)
    writer.add_add_space_prefix(begins)
    for role, index in ends.items():
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", index)
    writer.add_add_bos_token(begins_with_bos(tokenizer))
    writer.add_add_eos_token(False)
    suppressed = {*range(rows)}.difference(np.flatnonzero(tokenizer.known_ids).tolist())
    suppressed |= {*(generation.get("suppress_tokens") or ())}
    if suppressed:  # llama.cpp would generate rows without a token too
        writer.add_array("tokenizer.ggml.suppress_tokens", sorted(suppressed))
    if templates := _templates(tokenizer, directory):
        writer.add_chat_template(templates)


def _tokens(tokenizer: SLMTokenizer, library: Tokenizer, rows: int) -> tuple[list[str], list[int]]:
    """The spelling of each row and llama.cpp's type of it, [rows] each."""
    from gguf import TokenType

    vocabulary: dict[str, int] = library.get_vocab(with_added_tokens=True)
    if beyond := sorted((index, token) for token, index in vocabulary.items() if index >= rows):
        named = ", ".join(f"{index} ({token!r})" for index, token in beyond[:5])
        raise UserError(f"the tokenizer has {len(beyond):,} ids without a row in the model's {rows:,}: {named}")
    name = "UNUSED"
    while any(f"[{name}_{index}]" in vocabulary for index in range(rows)):
        name += "_"
    texts, types = [f"[{name}_{index}]" for index in range(rows)], [TokenType.UNUSED] * rows
    for token, index in vocabulary.items():
        texts[index], types[index] = token, TokenType.NORMAL
    groups = {TokenType.USER_DEFINED: tokenizer.added_words, TokenType.CONTROL: tokenizer.special_tokens}
    groups[TokenType.BYTE] = {byte: vocabulary[byte] for byte in byte_level.fallback_bytes(library)}
    for kind, tokens in groups.items():
        for index in tokens.values():
            types[index] = kind
    return texts, [*map(int, types)]


def _check_added(tokenizer: SLMTokenizer, library: Tokenizer) -> None:
    """llama.cpp reads special tokens in prompts alone, and takes each added token as it is spelled."""
    for token in library.get_added_tokens_decoder().values():
        rules = [rule for rule in ("lstrip", "rstrip", "single_word") if getattr(token, rule)]
        if rules and (tokenizer.chat_template or not token.special):
            raise ValueError(f"the added token {token.content!r} has the rule {rules[0]}")


def _parts(step: Content | None) -> Iterator[Content]:
    """The steps of a normalizer or pre-tokenizer, one after the other."""
    nested = (
        None if step is None else next((step[key] for key in ("normalizers", "pretokenizers") if key in step), None)
    )
    if nested is not None:
        for part in nested:
            yield from _parts(part)
    elif step:
        yield step


def _spelled(pattern: str) -> str:
    """One spelling for patterns that say the same."""
    return pattern.replace("\r", r"\r").replace("\n", r"\n").replace(r"[\p{L}]", r"\p{L}")


def _byte_level_pre(content: Content) -> str:
    """llama.cpp's name of the splitting."""
    for step in _parts(content["normalizer"]):
        if step["type"] != "NFC":  # which llama.cpp leaves out: text that is not in that form gets other ids
            raise ValueError(f"the normalizer {step['type']}")
    patterns = list[str]()
    for step in _parts(content["pre_tokenizer"]):
        cuts = step.get("behavior"), step.get("invert")
        if step["type"] == "Split" and cuts in (("Isolated", False), ("Removed", True)) and "Regex" in step["pattern"]:
            patterns.append(_spelled(step["pattern"]["Regex"]))
        elif step["type"] == "Digits" and step["individual_digits"]:
            patterns.append(r"\p{N}")
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            patterns += [GPT2] if step["use_regex"] else []
        else:
            raise ValueError(f"the splitting {json.dumps(step, ensure_ascii=False)}")
    whole = bool(content["model"].get("ignore_merges"))
    names = {name: takes for name, (known, takes) in PRE.items() if [*known] == patterns}
    same = [name for name, takes in names.items() if takes == whole]
    if not names:
        raise ValueError(f"the splitting {' then '.join(map(repr, patterns))}")
    if not same and not _merges_give_all_tokens(content):
        raise ValueError(f"ignore_merges: {str(whole).lower()} with the splitting {min(names)}")
    return (same or [*names])[0]


def _merges_give_all_tokens(content: Content) -> bool:
    """Whether the merges make each token of its own characters: then `ignore_merges` makes no difference."""
    pairs = [(first, second) for first, second in content["model"]["merges"]]
    merging = models.BPE(content["model"]["vocab"], pairs)
    added = {token["content"] for token in content["added_tokens"]}
    return all(len(merging.tokenize(token)) == 1 for token in content["model"]["vocab"] if token not in added)


def _sentencepiece(content: Content, texts: list[str], types: list[int]) -> tuple[str, str, list[float] | None, bool]:
    """Of merged characters with `▁` for a space: llama.cpp's model, pre-tokenizer, scores, and whether text begins
    with a space.
    """
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend, never = {"type": "Prepend", "prepend": "▁"}, {"type": "Metaspace", "prepend_scheme": "never"}
    idle = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    steps = [*_parts(content["normalizer"]), *_parts(content["pre_tokenizer"])]
    steps = [step for step in steps if step != idle or space not in steps]
    begins = steps == [prepend, space]
    if not begins and steps not in ([space], [never | {"replacement": "▁", "split": False}]):
        why = ""
        if any(step.get("prepend_scheme") in ("first", "always") for step in steps):
            why = ": llama.cpp puts a space before text after each special token, and before text that begins with one"
        raise ValueError(f"the splitting {json.dumps(steps, ensure_ascii=False)}{why}")
    scores = _scores(content, texts, types)
    if scores is not None:
        return "llama", "default", scores, begins
    if begins or any("\n" in text.strip("\n") or (text[:1] == "\n") != (text[-1:] == "\n") for text in texts):
        raise ValueError("merges that are not those of a SentencePiece model")
    return "gpt2", RAW, None, False


def _scores(content: Content, texts: list[str], types: list[int]) -> list[float] | None:
    """A score of each token [rows], for SentencePiece's merging: of all neighbours that join to a token, the pair of
    the highest score is merged first. None if `tokenizers`, which merges listed pairs alone, would merge others.
    """
    from gguf import TokenType

    ranks: dict[str, int] = {}
    pairs = {(first, second) for first, second in content["model"]["merges"]}
    previous = ""
    for rank, (first, second) in enumerate(content["model"]["merges"]):
        joined = first + second
        is_run = len({*joined}) == 1  # such as spaces, whose merges of all lengths are mixed
        if joined != previous and joined in ranks and not is_run:
            return None
        ranks.setdefault(joined, rank)
        previous = joined
    known = {*texts}
    for text, kind in zip(texts, types):
        is_cut_out = kind == TokenType.USER_DEFINED and "▁" not in text  # before anything is merged
        last = 0 if is_cut_out or kind == TokenType.UNUSED else len(text)
        for place in range(1, last):
            left, right = text[:place], text[place:]
            is_met = (place == 1 or left in known) and (place == last - 1 or right in known)
            if is_met and (left, right) not in pairs:
                return None
    return [float(-ranks.get(text, len(ranks) + len(pairs))) for text in texts]


def _ends(tokenizer: SLMTokenizer, generation: Content) -> dict[str, int]:
    """llama.cpp's name of a token's role → id. `generation`: the content of generation_config.json."""
    ids, template, names = tokenizer.special_tokens | tokenizer.added_words, tokenizer.chat_template, tokenizer._names
    spelled = {index: token for token, index in ids.items()}
    listed = generation["eos_token_id"]
    ends = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [] if listed is None else [listed])}
    turn = tokenizer.end_of_turn_id  # a base model's template has one too, which its configuration does not list
    # Llama 3's tokenizer calls the end of a turn its end of text; the base model's end is in the list alone.
    others = sorted(ends - {turn}, key=lambda index: (spelled.get(index) not in ENDS_OF_TEXT, index))
    eos = tokenizer.eos_token_id
    if eos == turn and others and "eos_token" not in (template or ""):
        eos = others[0]
    eot = turn if turn != eos else (others or [eos])[0]
    more = [index for index in others if index not in (eos, eot) and spelled.get(index) not in KNOWN_ENDS]
    if len(more) > 1:
        raise ValueError(f"more than three ends of a text: {sorted(ends)}")
    begins = [*tokenizer.beginning, *[index for index in [tokenizer.bos_token_id] if index is not None], eos]
    roles = {"bos": begins[0], "eos": eos, "eot": eot, **dict(zip(["eom"], more))}
    for role, key in (("unknown", "unk_token"), ("padding", "pad_token")):
        roles |= {role: ids[names[key]]} if names.get(key) in ids else {}
    fill = {token: role for role, tokens in FILL.items() for token in tokens.split()}
    roles |= {fill[token]: index for token, index in tokenizer.added_words.items() if token in fill}
    return roles


def begins_with_bos(tokenizer: SLMTokenizer) -> bool:
    """Whether llama.cpp puts the beginning-of-text token before each text. It does so before a rendered conversation
    too, unless the template has written it, so not for a template that never writes it.
    """
    if len(tokenizer.beginning) > 1:
        raise UserError(f"the tokenizer puts {len(tokenizer.beginning)} tokens before a text, llama.cpp at most one")
    if not tokenizer.beginning or tokenizer.chat_template is None:
        return bool(tokenizer.beginning)
    spelled = {index: token for token, index in tokenizer.special_tokens.items()}[tokenizer.beginning[0]]
    asked = [{"role": "user", "content": "?"}]
    return chat_prompt.prompt_of(tokenizer.chat_template, asked, None, tokenizer._names).startswith(spelled)


def _templates(tokenizer: SLMTokenizer, directory: Path) -> list[dict[str, str]]:
    """The chat templates by name; `default` is the tokenizer's."""
    if tokenizer.chat_template is None:
        return []
    config = directory / CONFIG
    listed = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    found = {each["name"]: each["template"] for each in listed} if isinstance(listed, list) else {}
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = path.read_text(encoding="utf-8")
    found["default"] = tokenizer.chat_template
    return [{"name": name, "template": template} for name, template in found.items()]
