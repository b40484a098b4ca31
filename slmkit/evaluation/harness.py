"""lm-eval's language model on our engine: `EngineLM` answers the requests of its tasks.

Item by item the same as lm-eval's own Hugging Face backend (`lm_eval.models.huggingface.HFLM`) on the same directory:
tokens, beginning token and cuts are as there. What a request gets depends on it alone, not on the others or their
order. Imports lm-eval, so import this module where it is needed.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from slmkit.config import UserError
from slmkit.evaluation.questions import run
from slmkit.evaluation.scoring import Ids, Tree, score
from slmkit.generation.engine import Engine, Request
from slmkit.generation.ensemble import LanguageModel
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.generation.text import end_tokens
from slmkit.model.cache import AT_ONCE
from slmkit.tokenizer import SLMTokenizer
from slmkit.tokenizer.chat import ConversationError

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")  # of a task's `gen_kwargs`
MEMORY = 4 * 2**30  # bytes of the KV cache, if a text does not need more
Pair = tuple[Any, list[int], list[int]]  # a request, the ids of its context and of its continuation


class EngineLM(TemplateLM):
    """A decoder as lm-eval's `LM`.

    `max_rows`: texts that run at the same time. `max_new_tokens`: instead of what tasks ask for. `progress` gets the
    requests answered and their number. `model_calls` counts what the model was asked. The engine is made when a text is
    to be generated: it compiles kernels, which log-probabilities do not need.
    """

    def __init__(
        self,
        decoder: LanguageModel,
        tokenizer: SLMTokenizer,
        *,
        max_rows: int = 128,
        max_new_tokens: int | None = None,
        progress: Callable[[int, int], None] = lambda done, requests: None,
    ) -> None:
        super().__init__()
        self.decoder, self.tokenizer, self.max_rows = decoder, tokenizer, max_rows
        self.max_new_tokens, self.progress = max_new_tokens, progress
        self.context, self.model_calls = decoder.max_positions, 0
        self._encoded = lru_cache(maxsize=4096)(self._encode)  # choices of one question share their context

    @cached_property
    def engine(self) -> Engine:
        memory = max(MEMORY, 2 * self.decoder.cache_bytes(1, self.context, AT_ONCE))
        return Engine(self.decoder, self.tokenizer, max_rows=self.max_rows, memory=memory)

    # -- tokens -------------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the tokenizer's beginning, else its end-of-text token."""
        bos = self.tokenizer.bos_token_id
        return next(iter(self.tokenizer.beginning), self.eot_token_id) if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids [tokens]. The tokenizer's own beginning is added to a text that does not spell it."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        return self._encoded(string, add_special_tokens)

    def _encode(self, string: str, add_special_tokens: bool) -> list[int]:
        return self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; without `add_generation_prompt` the last message is to be continued."""
        how: dict[str, Any] = {"begins": add_generation_prompt, "continues": not add_generation_prompt}
        try:
            return self.tokenizer.chat_prompt_text(chat_history, **how)
        except ConversationError:  # many templates know no system message
            messages = [message for message in chat_history if message["role"] != "system"]
            return self.tokenizer.chat_prompt_text(messages, **how)

    # -- log-likelihood -----------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """For each context and continuation: log-probability of the continuation (nats), and whether it is the
        likeliest one token by token. −inf for a continuation that is longer than the model's context.
        """
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # lm-eval's default is a bar

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """For each text: log-probability of all of it (nats), in windows of the model's context without overlap, the
        last of which is full.
        """
        windows: list[Pair] = []
        for number, (text,) in enumerate(request.args for request in requests):
            cuts = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.context, 1)
            windows += ((number, *make_disjoint_window(cut)) for cut in cuts)
        sums: dict[int, list[float]] = defaultdict(list)
        for (number, _, _), (log_probability, _) in zip(windows, self._loglikelihood_tokens(windows)):
            sums[number].append(log_probability)
        return [math.fsum(sums[number]) for number in range(len(requests))]

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **kwargs: Any) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)  # of an empty continuation
        places: dict[Ids, dict[Ids, list[int]]] = defaultdict(lambda: defaultdict(list))
        for place, (_, context, continuation) in enumerate(requests):
            context = context or [self.prefix_token_id]  # a context of white space, all of it in the continuation
            ids, new = (*context, *continuation)[-self.context - 1 :], len(continuation)
            if new > self.context:
                found[place] = -math.inf, False
            elif new:
                places[ids[:-new]][ids[-new:]].append(place)
        trees, done = [Tree(context, tuple(branches)) for context, branches in places.items()], 0
        self.model_calls += sum(len(tree.branches) for tree in trees)
        for number, scores in score(self.decoder, trees):
            tree = trees[number]
            for branch, answer in zip(tree.branches, scores):
                for place in places[tree.context][branch]:
                    found[place] = answer
                    done += 1
            self.progress(done, len(requests))
        return found

    # -- generation ---------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The continuation of each context, up to the first of its `until` strings or an end token, without it.

        A sampled text depends on its context, its `gen_kwargs` and how often the same request came before. Raises
        `UserError` if a task asks for as many new tokens as the context has.
        """
        places: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            places[json.dumps(request.args, sort_keys=True)].append(place)
        asked = []
        for content, its in places.items():
            context, options = requests[its[0]].args
            asked.append(self._generation(context, options, content, len(its)))
        texts, of_request, finished = [""] * len(requests), [*places.values()], 0
        ids: dict[int, list[int]] = defaultdict(list)  # by place
        self.model_calls += len(requests)
        for number, event in run(self.engine, {number: request for number, (request, _) in enumerate(asked)}):
            (request, stops), place = asked[number], of_request[number][event.index]
            if event.token is not None and event.token not in request.stop_ids:
                ids[place].append(event.token)
            if event.finish_reason:
                text = self.tokenizer.decode(ids[place], skip_special_tokens=True)
                texts[place] = postprocess_generated_text(text, stops, None)
                finished += 1
                self.progress(finished, len(requests))
        return texts

    def _generation(self, context: str, options: dict[str, Any], content: str, count: int) -> tuple[Request, list[str]]:
        """The request for `count` continuations of a context, and the strings that end them."""
        options = dict(normalize_gen_kwargs(options))
        stops = [*filter(None, options["until"]), self.tokenizer.eos_token]
        most = self.max_new_tokens or options["max_gen_toks"]
        if most >= self.context:
            raise UserError(
                f"{most:,} new tokens leave no room for a prompt in the context of {self.context:,}: lower "
                "--max-new-tokens"
            )
        is_begun = has_bos_prefix(context, self.tokenizer.bos_token)
        ids = self._encoded(context, not is_begun) or [self.prefix_token_id]
        seed = int.from_bytes(blake2b(content.encode(), digest_size=7).digest())
        chosen = {name: options[name] for name in SAMPLING if options.get(name) is not None}
        settings = SamplingSettings(seed=seed, do_sample=options["do_sample"], **chosen)
        ids = ids[-(self.context - most) :]
        stop_ids = frozenset(end_tokens(self.tokenizer))
        return Request(ids, most, settings, stop_ids, stops, n=count), stops
