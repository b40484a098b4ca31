"""One HTML file that holds a model, its tokenizer and an engine in JavaScript, and makes no request.

The page's engine (`page/`) knows no family: what differs is data that is computed here. Before it talks it repeats a
computation of slmkit with the same rounded weights, and says whether the results are equal.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
import re
import shutil
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import normalizers
from torch import Tensor, nn

from slmkit.adapt import quantize
from slmkit.config import UserError, importing
from slmkit.export.runtimes import Loaded, Runtime
from slmkit.files.find import learned_conversations, run_of
from slmkit.model.architectures import Architecture
from slmkit.model.decoder import Decoder
from slmkit.model.latent_attention import EPS
from slmkit.model.rope import DynamicNTK, Rope, Yarn
from slmkit.tokenizer import SLMTokenizer
from slmkit.tokenizer.chat_pieces import chat_pieces
from slmkit.tokenizer.encoder import PROBE

KINDS = ("int8", "int4", "f16", "f32")  # the default first
CHROMIUM = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")  # the first takes least
MOST_PARAMETERS = 60_000_000
GROUP = 32  # weights with one scale; rows are padded with zeros to a multiple of it
PAGE = Path(__file__).with_name("page")
ENGINE = ("assembler", "matrices", "decoder", "tokenizer", "chat_prompt", "sampling", "worker")
AT_ONCE = 3 << 20  # bytes of weights in one element of the page, a multiple of 3
GOLDEN_TOKENS, CLEAR = 32, 0.01  # a token is compared while the next likeliest is less likely by this much (log)

ROTARY = re.compile(r"attention\.(query|query\.up|latent)\.(weight|bias)$")  # of latent attention

# -- weights ----------------------------------------------------------------------------------------------------------


def write_html(loaded: Loaded, path: Path, kind: str) -> None:
    """Write the page of a model to `path`. `kind` is one of `KINDS`, for matrices.

    Raises `UserError` for more than 60 million parameters, a weight beyond float16, and a tokenizer that the page would
    read differently.
    """
    model, decoder, tokenizer = loaded.name, loaded.decoder, loaded.tokenizer
    if (size := sum(weight.numel() for weight in decoder.parameters())) > MOST_PARAMETERS:
        raise UserError(
            f"{model}: {size:,} parameters; an HTML page has at most {MOST_PARAMETERS:,}: use --to gguf, onnx or ollama"
        )
    a, tensors, rounded, blobs, at = decoder.architecture, {}, Decoder(decoder.architecture).eval(), [], 0
    for name, weight in decoder.named_parameters():
        entry, values, data = _stored(name, _for_the_page(a, name, weight.detach().float()), kind)
        tensors[name] = entry | {"at": at}
        at += len(data)
        blobs.append(data)
        rounded.get_parameter(name).data = _for_the_page(a, name, values, back=True).view(weight.shape)
    ids = tokenizer.encode(PROBE)
    header = {
        "name": Path(model).name, "kind": kind, "parameters": size, "bytes": at, "tensors": tensors,
        "model": _choices(a), "tokenizer": page_tokenizer(tokenizer), "chat": _chat(tokenizer),
        "beginning": [*tokenizer.beginning], "ends": sorted({tokenizer.eos_token_id, *tokenizer.stop_token_ids}),
        "has_template": tokenizer.chat_template is not None,
        "talks": learned_conversations(model) or run_of(model) is None,
        "suppressed": [*map(int, tokenizer.suppressed)],
        "golden": {"text": PROBE, "ids": ids, **_golden(rounded, ids[: max(1, a.max_positions // 2)])},
    }  # fmt: skip
    path.write_text(_page(header, b"".join(blobs)), encoding="utf-8")


def _for_the_page(a: Architecture, name: str, weight: Tensor, back: bool = False) -> Tensor:
    """A norm's weight with its offset; rows of rotary channels in the order in which the page pairs them."""
    if a.norm == "rms+1" and weight.dim() == 1 and name.endswith("weight"):
        return weight - 1 if back else weight + 1
    latent, rows = a.latent, weight.shape[0]
    if latent is None or not latent.neighbours_turn or not ROTARY.search(name):
        return weight
    pairs = torch.arange(latent.rope_dim).view(-1, 2).T.flatten()  # 0, 2, …, 1, 3, …
    period = latent.kv_rank if ".latent." in name else latent.plain_dim
    order = torch.cat((torch.arange(period), period + pairs))
    order = torch.cat([order + start for start in range(0, rows, len(order))])
    return weight[order.argsort() if back else order]


def _stored(name: str, weight: Tensor, kind: str) -> tuple[dict[str, Any], Tensor, bytes]:
    """What the page says of a weight, its rounded values, and its bytes, a multiple of 64. Raises `UserError`."""
    if weight.dim() == 1 or "norm" in name:
        parts, values, entry = [weight], weight, {"kind": "vector", "size": weight.numel()}
    else:
        rows, columns = weight.shape
        entry = {"kind": kind, "rows": rows, "columns": columns}
        padded = nn.functional.pad(weight, (0, -columns % GROUP))
        if kind in ("f32", "f16"):
            parts = [padded if kind == "f32" else padded.half()]
            values = parts[0].float()
            if not values.isfinite().all():
                raise UserError(f"{name}: has values beyond float16's 65,504: take f32 or int8")
        else:
            codes, scales = quantize.encode(padded, kind, GROUP)  # type: ignore[arg-type]
            parts = [codes, scales.bfloat16().view(torch.int16)]
            groups = quantize.values(quantize.unpack(codes, scales.shape[1], kind), kind)  # type: ignore[arg-type]
            values = (groups * scales[..., None]).flatten(1)
        values = values[:, :columns]
    data = b"".join(part.contiguous().numpy().tobytes() for part in parts)
    return entry, values, data + bytes(-len(data) % 64)


def _choices(a: Architecture) -> dict[str, Any]:
    """The architecture as the page's engine reads it."""
    ropes, latent = [*dict.fromkeys(layer.rope for layer in a.layers if layer.rope)], a.latent
    same = ("vocab_size", "width", "heads", "mlp_width", "max_positions", "norm_eps", "activation", "attention_scale",
            "embedding_scale", "attention_cap", "logit_cap")  # fmt: skip
    sizes: dict[str, Any] = {"kv_heads": a.kv_heads, "key_dim": a.head_dim, "value_dim": a.head_dim, "latent": None}
    if latent is not None:
        sizes = {"kv_heads": a.heads, "key_dim": latent.plain_dim + latent.rope_dim, "value_dim": latent.value_dim}
        names = ("query_rank", "kv_rank", "rope_dim", "plain_dim")
        sizes["latent"] = {name: getattr(latent, name) for name in names} | {"eps": EPS}
    return {name: getattr(a, name) for name in same} | sizes | {
        "norm": "layer" if a.norm == "layer" else "rms",
        "ropes": [_rope(rope) for rope in ropes],
        "layers": [{"rope": ropes.index(one.rope) if one.rope else -1, "window": one.window} for one in a.layers],
    }  # fmt: skip


def _rope(rope: Rope) -> dict[str, Any]:
    scaling, dynamic = rope.scaling, None
    if isinstance(scaling, DynamicNTK):
        original = scaling.original_max_position_embeddings
        dynamic = {"factor": scaling.factor, "original": original, "theta": rope.theta, "dim": rope.dim}
    growth = scaling.length if isinstance(scaling, Yarn) else 1.0
    return {"frequencies": rope.frequencies().tolist(), "growth": growth, "dynamic": dynamic}


@torch.inference_mode()
def _golden(decoder: Decoder, prompt: list[int]) -> dict[str, Any]:
    """The likeliest tokens after a prompt, and greedy ids until one is not clearly the likeliest."""
    count = min(GOLDEN_TOKENS, decoder.max_positions - len(prompt))
    cache, fresh, found = decoder.new_cache(1, len(prompt) + count, len(prompt)), prompt, dict[str, Any]()
    for _ in range(count):
        log_probs = decoder.logits(decoder(torch.tensor([fresh]), cache)[0, -1]).log_softmax(-1)
        best, ids = (part.tolist() for part in log_probs.topk(min(16, len(log_probs))))
        found = found or {"prompt": prompt, "top": [*zip(ids, best)], "greedy": []}
        if best[0] - best[1] < CLEAR:
            break
        fresh = ids[:1]
        found["greedy"] += fresh
    return found


# -- tokenizer and chat template --------------------------------------------------------------------------------------

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What Oniguruma's escapes are in JavaScript, where \s, \d and \w are others.
ESCAPES = {
    r"\s": r"\p{White_Space}", r"\S": r"\P{White_Space}", r"\d": r"\p{Nd}", r"\D": r"\P{Nd}",
    r"\w": r"\p{Alphabetic}\p{M}\p{Nd}\p{Pc}", **{rf"\{letter}": rf"\{letter}" for letter in "rntvf"},
}  # fmt: skip
PART = re.compile(r"\\[pP]\{\w+\}|\\.|\(\?i:|\(\?<?[=!:]|\[\^?|[?*+}]\+|.", re.DOTALL)
CATEGORY = re.compile(r"\\[pP]\{(L[ultmo]?|M[nce]?|N[dlo]?|P[cdseifo]?|S[mcko]?|Z[slp]?|C[cfo]?)\}")
SCRIPT = re.compile(r"\\[pP]\{(Han|Hiragana|Katakana|Hangul|Latin|Greek|Cyrillic|Arabic|Hebrew|Thai|Devanagari)\}")
LIGATURES = ("ff", "fi", "fl", "ss", "st")  # letters that also match one character, such as ß, where case is ignored
FOLDS = {"s": "ſ", "k": "\u212a"}  # characters beyond ASCII that equal a letter where case is ignored


def javascript_pattern(pattern: str) -> str:
    """A regular expression of `tokenizers` (Oniguruma) as one of JavaScript's, with the flag u, that matches the same.

    Raises `UserError` for one of which that is not certain.
    """
    made, groups, in_class = [], [False], False  # groups: whether case is ignored in each open one
    parts = PART.findall(pattern)
    for before, part in zip(["", *parts], parts):
        ignores_case = groups[-1]
        is_unsure = part[0] in ("[&\\" if in_class else "^$\\") or (part[1:] == "+" and not in_class)
        is_folded = part == "-" if in_class else (before + part).lower() in LIGATURES
        if part in ESCAPES:
            made.append(ESCAPES[part] if in_class or part != r"\w" else f"[{ESCAPES[part]}]")
        elif CATEGORY.fullmatch(part):
            made.append(part)
        elif SCRIPT.fullmatch(part):
            made.append(part.replace("{", "{Script="))
        elif part[0] == "\\" and len(part) == 2 and not part[1].isalnum():
            made.append(part if part[1] in "^$\\.*+?()[]{}|/" or (in_class and part[1] == "-") else part[1])
        elif is_unsure or (ignores_case and (is_folded or not part.isascii())):
            raise UserError(f"the tokenizer's pattern {pattern!r} has {part!r}, which an HTML page cannot express")
        elif ignores_case and part.isalpha():
            cases = part.lower() + part.upper() + FOLDS.get(part.lower(), "")
            made.append(cases if in_class else f"[{cases}]")
        else:
            made.append({"(?i:": "(?:", ".": "." if in_class else r"[^\n]"}.get(part, part))
            if not in_class and part[0] in "()":
                groups = [*groups, part == "(?i:" or groups[-1]] if part[0] == "(" else groups[:-1]
            in_class = part != "]" if in_class else part[0] == "["
    return "".join(made)


def page_tokenizer(tokenizer: SLMTokenizer) -> dict[str, Any]:
    """The tokenizer as the page reads it. Raises `UserError` for a part that the page has not, by name."""
    encoder = tokenizer._encoder
    content = json.loads(encoder.ordinary.to_str())
    model = content["model"]
    if model["type"] != "BPE" or any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        raise UserError(
            f"an HTML page reads BPE tokenizers; this one is {model['type']}, or has options it lacks: use --to onnx"
        )
    ids, steps = model["vocab"], [_normalizer(one) for one in _sequence(content["normalizer"], "normalizers")]
    flags = ("content", "lstrip", "rstrip", "single_word", "normalized")
    special = [{flag: getattr(encoder.added[i], flag) for flag in flags} | {"id": i} for i in encoder.special.values()]
    return {
        "vocabulary": {token: index for token, index in ids.items() if token not in encoder.secret},
        "merges": [[ids[first], ids[second], ids[first + second]] for first, second in model["merges"]],
        "byte_level": encoder.is_byte_level, "byte_fallback": model["byte_fallback"], "fuse_unk": model["fuse_unk"],
        "ignore_merges": model["ignore_merges"], "unknown": ids.get(model["unk_token"]),
        "special": special, "added": [token for token in content["added_tokens"] if not token["special"]],
        "normalizers": steps,
        "unknown_characters": _unknown_characters() if any("form" in one for one in steps) else "",
        "pre_tokenizers": [_pre_tokenizer(one) for one in _sequence(content["pre_tokenizer"], "pretokenizers")],
    }  # fmt: skip


def _sequence(content: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    return [one for part in content[parts] for one in _sequence(part, parts)] if content and parts in content else [
        content] if content else []  # fmt: skip


def _normalizer(content: dict[str, Any]) -> dict[str, Any]:
    match content:
        case {"type": "NFC" | "NFD" | "NFKC" | "NFKD" as form}:
            return {"form": form}
        case {"type": "Prepend", "prepend": text}:
            return {"prepend": text}
        case {"type": "Replace", "pattern": {"String": old}, "content": new}:
            return {"from": old, "to": new}
    raise UserError(f"an HTML page has no normalizer {json.dumps(content)[:100]}: use --to onnx")


@cache
def _unknown_characters() -> str:
    """Characters that Unicode's tables in `tokenizers`, which are older than a browser's, do not have, as the inside of
    a class of a regular expression: no combining class, no decomposition.
    """
    nfd, nfkd = normalizers.NFD().normalize_str, normalizers.NFKD().normalize_str

    def is_unknown(character: str) -> bool:
        place = unicodedata.combining(character)
        if unicodedata.category(character) == "Cn":
            return True
        if place:  # the two trade places
            moved = f"{character}\u0334" if place > 1 else f"\u0315{character}"
            return nfd(moved) == moved
        return nfkd(character) != unicodedata.normalize("NFKD", character)

    codes = [code for code in range(0x80, 0x110000) if not 0xD800 <= code < 0xE000 and is_unknown(chr(code))]
    runs = (list(run) for _, run in itertools.groupby(enumerate(codes), lambda pair: pair[1] - pair[0]))
    return "".join(rf"\u{{{run[0][1]:x}}}-\u{{{run[-1][1]:x}}}" for run in runs)


def _pre_tokenizer(content: dict[str, Any]) -> dict[str, Any]:
    isolated = {"behavior": "Isolated", "invert": False}
    match content:
        case {"type": "ByteLevel", "use_regex": words, "add_prefix_space": prefix}:
            pattern = {"pattern": javascript_pattern(GPT2_WORDS)} if words else {}
            return {"bytes": True, "prefix_space": prefix} | isolated | pattern
        case {"type": "Digits", "individual_digits": each}:
            return isolated | {"pattern": r"\p{N}" if each else r"\p{N}+"}
        case {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme, "split": split}:
            pattern = {"pattern": mark, "behavior": "MergedWithNext"} if split else {}
            return {"metaspace": mark, "scheme": scheme} | isolated | pattern
        case {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert} if behavior != "Contiguous":
            expression = (
                javascript_pattern(pattern["Regex"])
                if "Regex" in pattern
                else re.sub(r"[\^$\\.*+?()\[\]{}|/]", r"\\\g<0>", pattern["String"])
            )
            return {"pattern": expression, "behavior": behavior, "invert": invert}
    raise UserError(f"an HTML page has no pre-tokenizer {json.dumps(content)[:100]}: use --to onnx")


def _chat(tokenizer: SLMTokenizer) -> dict[str, Any] | None:
    """The chat template as fixed text around messages; None without one, and for one that is not of this form."""
    try:
        pieces = chat_pieces(tokenizer) if tokenizer.chat_template else None
    except UserError:
        pieces = None
    if pieces is None:
        return None
    spaces = "".join(filter(str.isspace, map(chr, range(0x3001))))  # JavaScript's `trim` removes others
    return dataclasses.asdict(pieces) | {"trimmed": [*pieces.trimmed], "spaces": spaces}


# -- the file ---------------------------------------------------------------------------------------------------------


def _page(header: dict[str, Any], weights: bytes) -> str:
    """The page's text. What comes from the model is JSON in which `<` is escaped, so that it can end no element."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in PAGE.iterdir()}
    engine, script = "\n".join(texts[f"{name}.js"] for name in ENGINE), texts["app.js"]
    parts = (base64.b64encode(weights[start : start + AT_ONCE]).decode() for start in range(0, len(weights), AT_ONCE))
    filled = {
        "style": texts["style.css"], "script": script, "engine": engine, "kernels": texts["kernels.wat"],
        "script-hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "header": json.dumps(header, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"),
        "weights": "\n".join(f'<script type="text/plain" class="weights">{part}</script>' for part in parts),
    }  # fmt: skip
    return re.sub(r"\{\{([a-z-]+)\}\}", lambda match: filled[match[1]], texts["page.html"])


class HtmlPage(Runtime):
    """The engine of a finished page, in Chromium. `size`: of the file, in bytes.

    Raises `UserError` without playwright or Chromium, and if the page finds that it computes something else.
    """

    name = "HTML page"

    def __init__(self, path: Path, browser: Any = None) -> None:
        """`browser`: a `Browser` of playwright, which is not closed; without one Chromium is started."""
        self.size = path.stat().st_size
        self._playwright: Any = None
        self._browser = browser or self._started()
        self.page = self._browser.new_page()
        self.page.goto(path.resolve().as_uri())
        asked = "'slm' in window ? slm.ready().catch((error) => ({ what: String(error) })) : { what: 'it has none' }"
        self.checked = self.page.evaluate(asked)
        if not self.checked.get("equal"):
            self.close()
            raise UserError(f"{path}: the page's own check fails: {self.checked['what']}")

    def _started(self) -> Any:
        with importing("an HTML page is checked in Chromium by playwright: pip install playwright"):
            from playwright.sync_api import sync_playwright
        browser = next(filter(None, map(shutil.which, CHROMIUM)), None)
        if browser is None:
            raise UserError(f"an HTML page is checked in Chromium: none of {', '.join(CHROMIUM)} is on the PATH")
        self._playwright = sync_playwright().start()
        return self._playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--headless"])

    def _call(self, name: str, *arguments: Any) -> Any:
        # JSON both ways: playwright's own form is slow for many numbers, and cannot hold half of a surrogate pair.
        script = "async ([name, text]) => JSON.stringify(await window.slm[name](...JSON.parse(text)))"
        return json.loads(self.page.evaluate(script, [name, json.dumps(arguments)]))

    def encode(self, text: str) -> list[int]:
        return self._call("encode", text)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int] | None:
        return self._call("encodeChat", messages)

    def log_probs(self, ids: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
        found = self._call("logProbs", [*ids], [*lengths])  # base64
        return np.frombuffer(base64.b64decode(found), dtype=np.float32).reshape(len(lengths), -1)

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        return self._call("greedy", [*ids], count)

    def close(self) -> None:
        self.page.close()
        if self._playwright is not None:
            self._browser.close()
            self._playwright.stop()
