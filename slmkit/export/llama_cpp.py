"""llama.cpp as a runtime: a child process serves a GGUF by `xllamacpp` on loopback.

A child, since ggml ends its process where a file breaks one of its assertions.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from slmkit.config import UserError, importing, one_line
from slmkit.files.child import Child, free_port

KEY = "SLM_LLAMA_CPP_KEY"  # environment: the key that the child asks of each request
ERROR = re.compile(r"^(?:[\d.]+ E )?(?:\w+: )?(error loading model: .*|.*GGML_ASSERT.*|.*GGML_ABORT.*)$", re.M)
OTHER_ERROR = re.compile(r"^[\d.]+ E (?!Traceback)(.*)$", re.M)


def server_command(gguf: Path, port: int, **options: str | int | bool) -> list[str]:
    """The command of a process that serves the file at 127.0.0.1:`port`, by llama.cpp's API and OpenAI's.

    `options` are those of `main`: `context` (tokens of a request), `parallel` (requests at once), `alias` (the model's
    name), `threads`, `exact` (float32 KV cache, no flash attention, no cache of prompts). The environment's `KEY`,
    where it is set, is asked of every request as a bearer token.
    """
    words = [sys.executable, "-m", "slmkit.export.llama_cpp", str(gguf), str(port)]
    return [*words, *(f"--{name}={value}" for name, value in options.items())]


class LlamaCpp:
    """A GGUF in llama.cpp on one thread, with a float32 KV cache: as exact as the file's types allow."""

    name, rounds_activations = "llama.cpp", True
    composes = False  # it has no normalizer: text that is not in normal form C gets other ids
    # Nats of a log-probability: llama.cpp has GELU as a float16 table, also for float32 weights. Measured: up to 0.014.
    gelu_error = 0.03

    def __init__(self, gguf: Path, context: int) -> None:
        """`context`: tokens of the longest prompt with its continuation.

        Raises `UserError` without xllamacpp, and with llama.cpp's own words for a file that it refuses.
        """
        import_xllamacpp()
        self.gguf, self.size, self.key = gguf, gguf.stat().st_size, secrets.token_hex(16)
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (close() closes it)
        port = free_port()
        command = server_command(gguf, port, context=context, threads=1, exact=True)
        self.child = Child(command, {KEY: self.key}, self.log)
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
        try:
            self._wait_until_ready()
            self.vocabulary: int = self._ask("GET", "/v1/models")["data"][0]["meta"]["n_vocab"]
            self.plain = self.encode("a")[0]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def stored(self, loaded: object) -> tuple[()]:
        """None here: `gguf.matrices_of` reads them, with torch, which the child does without."""
        return ()

    def close(self) -> None:
        self.connection.close()
        self.child.kill()
        self.log.close()

    def encode(self, text: str) -> list[int]:
        """Ids [tokens] of ordinary text: special tokens in it are not recognised, none is added."""
        return self._ask("POST", "/tokenize", content=text, add_special=False, parse_special=False)["tokens"]

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int] | None:
        """Ids [tokens] of the conversation as llama.cpp renders and reads it; None if the file has no template."""
        if not self.has_template:  # llama.cpp would take one of its own
            return None
        prompt = self._ask("POST", "/apply-template", messages=[*messages])["prompt"]
        # As for a request: the beginning that llama.cpp took out of the rendered text is added again.
        return self._ask("POST", "/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]

    @cached_property
    def has_template(self) -> bool:
        return "tokenizer.chat_template" in fields_of(self.gguf)

    def log_probs(self, ids: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
        """Natural log-probabilities of the token after each `ids[:length]`, float32 [lengths, vocabulary]."""
        table = np.empty((len(lengths), self.vocabulary), dtype=np.float32)
        for row, length in enumerate(lengths):
            # A token of ASCII is forced: without a whole character llama.cpp answers no probabilities.
            answer = self._complete(ids[:length], 1, n_probs=self.vocabulary, logit_bias=[[self.plain, 1e9]])
            (step,) = answer["completion_probabilities"]
            entries = step["top_logprobs"]
            table[row, [entry["id"] for entry in entries]] = [entry["logprob"] for entry in entries]
        return table

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The `count` most probable tokens, one after the other; end tokens are among them."""
        found: list[int] = []
        while len(found) < count:
            # An end token ends the request, and stands in the tokens alone.
            found += self._complete([*ids, *found], count - len(found), return_tokens=True)["tokens"]
        return found

    def _complete(self, ids: Sequence[int], count: int, **options: Any) -> Any:
        options |= {"post_sampling_probs": False, "temperature": 0, "cache_prompt": False}
        return self._ask("POST", "/completion", prompt=[*map(int, ids)], n_predict=count, **options)

    def _ask(self, method: str, path: str, **body: Any) -> Any:
        """The JSON of the answer. Raises `UserError` for a refusal, and if the child ends."""
        headers = {"authorization": f"Bearer {self.key}", "content-type": "application/json"}
        for is_last in (False, True):
            try:
                self.connection.request(method, path, json.dumps(body) if body else None, headers)
                response = self.connection.getresponse()
                answer = json.loads(response.read())
                break
            except (ConnectionError, http.client.HTTPException):  # also of a connection that waited for too long
                self.connection.close()
                if is_last:
                    self.child.process.wait(60)
                    raise UserError(f"{self.gguf}: llama.cpp ended: {self._last_words()}") from None
        if response.status != 200:
            raise UserError(f"{self.gguf}: llama.cpp: {answer['error']['message']}")
        return answer

    def _wait_until_ready(self) -> None:
        while True:
            try:
                self.connection.request("GET", "/health")
                response = self.connection.getresponse()
                response.read()
                if response.status == 200:
                    return
            except (OSError, http.client.HTTPException):
                self.connection.close()
            if self.child.process.poll() is not None:
                raise UserError(f"{self.gguf}: llama.cpp refuses it: {self._last_words()}")
            time.sleep(0.02)

    def _last_words(self) -> str:
        """What llama.cpp said of its end, in one line."""
        self.log.seek(0)
        said = self.log.read().decode(errors="replace")
        found = ERROR.findall(said) or OTHER_ERROR.findall(said) or said.strip().splitlines()[-1:]
        return "; ".join(found[:2]) or f"exit code {self.child.process.returncode}"


def fields_of(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF, as `gguf` reads it. Raises `UserError` for another file."""
    from gguf import GGUFReader

    try:
        return GGUFReader(path).fields
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise UserError(f"{path}: not a readable GGUF: {one_line(error)}") from None


def context_of(path: Path) -> int:
    """The tokens of the longest text that the model of a GGUF is made for. Raises `UserError` as `fields_of` does."""
    fields = fields_of(path)
    length = fields.get(f"{fields['general.architecture'].contents()}.context_length")
    if length is None:
        raise UserError(f"{path}: it does not say its context length")
    return int(length.contents())


def import_xllamacpp() -> Any:
    """Raises `UserError` if it is not installed."""
    with importing("llama.cpp is not installed: pip install slmkit[export]"):
        import xllamacpp
    return xllamacpp


def main() -> None:
    """The child: serve until the end."""
    parser = argparse.ArgumentParser("slmkit.export.llama_cpp")
    parser.add_argument("gguf")
    parser.add_argument("port", type=int)
    usual: dict[str, Any] = {"context": 0, "parallel": 1, "threads": 0, "alias": "", "exact": False}
    for name, value in usual.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    asked = parser.parse_args()
    library = import_xllamacpp()
    settings = library.CommonParams()
    settings.model.path, settings.port, settings.api_keys = asked.gguf, asked.port, [os.environ[KEY]]
    settings.n_ctx, settings.n_parallel = asked.context * asked.parallel, asked.parallel
    settings.verbosity, settings.ui, settings.endpoint_slots = 1, False, False
    settings.warmup = settings.fit_params = False
    if asked.alias:
        settings.model_alias = {asked.alias}
    if asked.threads:
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = asked.threads
    if asked.exact:
        settings.cache_type_k = settings.cache_type_v = library.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.n_gpu_layers, settings.swa_full = 0, True
    try:
        server = library.Server(settings)  # noqa: F841 (it serves as long as it is there)
    except RuntimeError:  # llama.cpp has said why on standard error
        sys.exit(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # llama.cpp's own handler stops the server, not this process
    signal.pause()


if __name__ == "__main__":
    main()
