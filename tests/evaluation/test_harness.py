"""`EngineLM` beside a loop without batches or cache, and beside lm-eval's own Hugging Face backend."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from slmkit.adapt.load import load_model
from slmkit.config import UserError
from slmkit.evaluation.harness import EngineLM
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer
from tests.real_data import real_data
from tests.tokenizer.kinds import directory_of

# A byte-level BPE without and with a beginning token, one as Llama 2's, and one whose class transformers rebuilds.
KINDS = ["byte-level", "byte-level-bos", "metaspace-first", "llama-class"]
CONTEXT = 128


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def small(vocab_size: int, context: int, family: str = "llama", **more: Any) -> tuple[Decoder, SLMConfig]:
    """Random weights, large enough for definite choices."""
    config = SLMConfig(
        model_type=family, vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=context, initializer_range=0.3, **more,
    )  # fmt: skip
    return build_decoder(config, seed=1).eval(), config


# -- beside a loop ----------------------------------------------------------------------------------------------------


def by_hand(decoder: Decoder, context: list[int], continuation: list[int], longest: int) -> tuple[float, bool]:
    """One forward pass over what fits, for one pair alone."""
    text = [*context, *continuation][-longest - 1 :]
    with torch.no_grad():
        log = decoder.logits(decoder(torch.tensor([text[:-1]]))[0]).log_softmax(-1)[-len(continuation) :]
    sum_ = math.fsum(float(row[token]) for row, token in zip(log, continuation))
    return sum_, log.argmax(-1).tolist() == continuation


def test_five_hundred_scores_are_those_of_a_loop_without_batches_or_cache() -> None:
    """V5, exactly, in double precision, with contexts that are shared, cut, empty and contain each other."""
    pick, asked, expected, cut = random.Random(5), 0, list[tuple[float, bool]](), 0
    for longest in (3, 4, 8, 16, 64):
        decoder, _ = small(40, longest)
        decoder.double()
        lm = EngineLM(decoder, SLMTokenizer(300), max_rows=pick.choice([1, 4, 32]))
        shared = [pick.choices(range(40), k=pick.randint(1, longest + 4)) for _ in range(12)]
        pairs = []
        for _ in range(100):
            context = pick.choice(shared)
            context = context[: pick.randint(1, len(context))] if pick.random() < 0.3 else context
            pairs.append((context, pick.choices(range(40), k=pick.randint(1, longest))))
        with torch.no_grad():  # continuations that are the likeliest ones
            for context, continuation in pairs[::7]:
                del continuation[: max(0, len(context) + len(continuation) - longest)]
                for place in range(len(continuation)):
                    read = torch.tensor([[*context, *continuation[:place]][-longest:]])
                    continuation[place] = int(decoder.logits(decoder(read)[0, -1]).argmax())
        found = lm._loglikelihood_tokens([(None, *pair) for pair in pairs])
        for (context, continuation), (sum_, greedy) in zip(pairs, found):
            if not continuation:
                assert (sum_, greedy) == (0.0, True)
                continue
            expected.append(by_hand(decoder, context, continuation, longest))
            assert sum_ == pytest.approx(expected[-1][0], abs=1e-9)
            assert greedy is expected[-1][1]
        cut += sum(len(context) + len(continuation) - 1 > longest for context, continuation in pairs)
        asked += len(pairs)
    assert asked == 500
    assert cut > 50
    assert 20 < sum(greedy for _, greedy in expected) < 480


def test_the_last_token_of_a_full_context_is_scored_and_what_is_longer_is_refused() -> None:
    decoder, _ = small(40, 3)
    lm = EngineLM(decoder, SLMTokenizer(300))
    a, b, c, d, e = range(5)
    ((cut, _), (whole, _), (refused, greedy)) = lm._loglikelihood_tokens(
        [(None, [a, b, c], [d, e]), (None, [b, c], [d, e]), (None, [a], [b, c, d, e])]
    )
    assert cut == pytest.approx(whole, abs=1e-6)
    assert (refused, greedy) == (-math.inf, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_depend_on_no_other_request(dtype: torch.dtype) -> None:
    decoder, _ = small(260, 64)
    decoder.to(dtype)
    pick = random.Random(1)
    words = ["the", " cat", " sat", " on", "a", " mat", ".", "\n", " ", "é"]
    contexts = ["".join(pick.choices(words, k=pick.randint(0, 12))) for _ in range(10)]
    pairs = [(pick.choice(contexts), " " + pick.choice(words) + pick.choice(words)) for _ in range(60)]
    found = []
    for rows in (1, 3, 64):
        lm, order = EngineLM(decoder, SLMTokenizer(260), max_rows=rows), pick.sample(range(60), 60)
        answers = lm.loglikelihood(instances("loglikelihood", [pairs[place] for place in order]))
        found.append([answer for _, answer in sorted(zip(order, answers))])
        assert lm.model_calls == len({*pairs})
    for others in found[1:]:
        for (sum_, greedy), (first, same) in zip(others, found[0]):
            assert sum_ == pytest.approx(first, abs=1e-4 if dtype == torch.float32 else 1e-10)
            assert greedy is same


def test_an_empty_continuation_has_probability_one() -> None:
    lm = EngineLM(small(260, 16)[0], SLMTokenizer(260))
    assert lm.loglikelihood(instances("loglikelihood", [("a", "")])) == [(0.0, True)]
    assert lm.loglikelihood([]) == lm.loglikelihood_rolling([]) == lm.generate_until([]) == []


# -- beside lm-eval's own backend -------------------------------------------------------------------------------------


class Both:
    """One directory, as `EngineLM` and as lm-eval's Hugging Face backend."""

    def __init__(self, folder: Path, kind: str, family: str) -> None:
        from lm_eval.models.huggingface import HFLM

        directory = directory_of(kind, folder)
        self.tokenizer = SLMTokenizer.from_pretrained(directory)
        decoder, config = small(
            len(self.tokenizer), CONTEXT, family, eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id,
        )  # fmt: skip
        save_decoder(decoder, config, directory)
        self.decoder = load_model(directory, torch.device("cpu"))[0]
        self.ours = EngineLM(self.decoder, self.tokenizer)
        self.theirs = HFLM(pretrained=str(directory), device="cpu", batch_size=8, dtype="float32")


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    family = "mistral" if request.param == "byte-level-bos" else "llama"
    return Both(tmp_path_factory.mktemp("models"), request.param, family)


def expect_same(both: Both, pairs: list[tuple[str, str]]) -> None:
    asked = instances("loglikelihood", pairs)
    expected = both.theirs.loglikelihood(asked, disable_tqdm=True)
    for pair, ours, theirs in zip(pairs, both.ours.loglikelihood(asked), expected):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-4, rel=2e-6), pair
        assert ours[1] == theirs[1], pair


def test_the_space_at_the_join_belongs_to_the_continuation(both: Both) -> None:
    """V7."""
    pairs = [("Q: x A: ", "yes"), ("Q: x A:", " yes"), ("Q: x A:  ", "yes"), ("Q: x A:\n", "yes"), ("", "yes")]
    first, second, *_ = (both.ours._encode_pair(*pair) for pair in pairs[:2])
    assert first == second
    bos = both.tokenizer.decode(both.ours.prefix_token_id)
    expect_same(
        both, [*pairs, (bos, "yes"), (bos + "the cat", " sat"), ("", " the"), ("a", "b" * 100), ("x" * 300, " y")]
    )
    assert both.ours.prefix_token_id == both.theirs.prefix_token_id
    # A context of white space alone, all of which belongs to the continuation: the backend has nothing to read first.
    for space in (" ", "\n\n", "\u3000"):
        white, none = both.ours.loglikelihood(instances("loglikelihood", [(space, "yes"), ("", f"{space}yes")]))
        if both.tokenizer.beginning:
            expect_same(both, [(space, "yes")])
        assert white == none


def real_pairs(task: str, count: int) -> list[tuple[str, str]]:
    """Contexts and continuations of the first items of a task."""

    def rows(name: str) -> list[dict[str, Any]]:
        lines = real_data(f"evals/{name}").read_bytes()
        lines = gzip.decompress(lines) if name.endswith(".gz") else lines
        return [json.loads(line) for line in lines.decode().splitlines()[:count]]

    if task == "hellaswag":
        return [
            (f"{row['activity_label']}: {row['ctx']}", f" {ending}")
            for row in rows("hellaswag-val-1000.jsonl.gz")
            for ending in row["endings"]
        ]
    if task == "piqa":
        asked = [(f"Question: {row['goal']}\nAnswer:", row) for row in rows("piqa/valid.jsonl")]
        return [(question, f" {row[name]}") for question, row in asked for name in ("sol1", "sol2")]
    if task == "winogrande":
        found = rows("winogrande.jsonl.gz")
        return [(begin, f" {row['continuation']}") for row in found for begin in row["context_options"]]
    if task == "lambada":
        return [(row["context"], f" {row['continuation'].strip()}") for row in rows("lambada_openai.jsonl.gz")]
    return [(row["query"], f" {choice}") for row in rows(f"{task}.jsonl.gz") for choice in row["choices"]]


@pytest.mark.parametrize("task", ["hellaswag", "arc_easy", "piqa", "winogrande", "lambada"])
def test_real_items_are_answered_as_by_the_hugging_face_backend(both: Both, task: str) -> None:
    pairs = real_pairs(task, 12)
    fit = [pair for pair in pairs if len(both.ours._encode_pair(*pair)[1]) <= CONTEXT]  # the backend refuses the others
    expect_same(both, fit)


def test_whole_texts_are_scored_in_the_same_windows(both: Both) -> None:
    pick = random.Random(3)
    texts = [" ".join(pick.choices(["the cat", "sat", "on", "1234", "é"], k=k)) for k in (1, 3, 20, 60, 150)]
    asked = instances("loglikelihood_rolling", [(text,) for text in texts])
    expected = both.theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert both.ours.loglikelihood_rolling(asked) == pytest.approx(expected, abs=1e-3, rel=2e-6)


def test_greedy_texts_are_the_same(both: Both) -> None:
    contexts = ["the cat", "on the", "1234", "Question: what is", "the sea " * 60, " a", "mat. The", "x"]
    for options in ({"until": ["\n", "a"]}, {"until": "e", "do_sample": False}, {"until": [], "temperature": 0.0}):
        asked = instances("generate_until", [(text, options | {"max_gen_toks": 12}) for text in contexts])
        assert both.ours.generate_until(asked) == both.theirs.generate_until(asked, disable_tqdm=True)


# -- generation -------------------------------------------------------------------------------------------------------


def test_texts_end_at_any_end_token_and_are_those_of_a_run_alone() -> None:
    """V9: rows end at different times, one of them at a token that is not the tokenizer's end of text."""
    decoder, _ = small(260, CONTEXT)
    tokenizer = SLMTokenizer(260)
    contexts = [f"{letter} is" for letter in "abcdefghij"]
    asked = instances("generate_until", [(text, {"max_gen_toks": 30}) for text in contexts])
    free = EngineLM(decoder, tokenizer).generate_until(asked)
    ascii_ = {one for one in "".join(free) if one.isascii()}
    letter = max(sorted(ascii_), key=lambda one: sum(one in text for text in free))
    (end,) = tokenizer.encode(letter)
    tokenizer.further_stops = {end}
    ended = EngineLM(decoder, tokenizer, max_rows=4).generate_until(asked)
    assert ended == [text.partition(letter)[0] for text in free]
    assert len({len(text) for text in ended}) > 2
    for one, text in zip(asked, ended):
        assert EngineLM(decoder, tokenizer).generate_until([one]) == [text]


def test_a_sampled_text_belongs_to_its_request_and_not_to_its_place() -> None:
    decoder, _ = small(260, CONTEXT)
    options = {"until": [], "do_sample": True, "temperature": 0.9, "top_p": 0.95, "top_k": 50, "max_gen_toks": 12}
    asked = instances("generate_until", [(text, options) for text in ("a", "b", "a", "c", "a")])
    lm = EngineLM(decoder, SLMTokenizer(260))
    texts = lm.generate_until(asked)
    assert len({*texts}) == 5, "the same request again is another sample"
    assert lm.generate_until(asked) == texts
    assert lm.model_calls == 10
    turned = EngineLM(decoder, SLMTokenizer(260), max_rows=2).generate_until(asked[::-1])
    assert (turned[3], turned[1]) == (texts[1], texts[3])
    assert sorted(turned[0::2]) == sorted(texts[0::2])


def test_as_many_new_tokens_as_the_context_are_refused_and_long_prompts_are_cut() -> None:
    """V13, the part of the model."""
    lm = EngineLM(small(260, 32)[0], SLMTokenizer(260))
    with pytest.raises(UserError, match="32 new tokens leave no room for a prompt in the context of 32"):
        lm.generate_until(instances("generate_until", [("a", {"max_gen_toks": 32})]))
    asked = instances("generate_until", [("a" * 40 + "bc", {"max_gen_toks": 20}), ("bc", {"max_gen_toks": 20})])
    first, second = lm.generate_until(asked)
    assert first == lm.generate_until(instances("generate_until", [("a" * 10 + "bc", {"max_gen_toks": 20})]))[0]
    few = EngineLM(lm.engine.decoder, SLMTokenizer(260), max_new_tokens=3).generate_until(asked)
    assert few[1] == second[: len(few[1])]
    assert len(few[1]) <= 3


def test_the_chat_form_is_that_of_the_hugging_face_backend(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = SLMTokenizer(260)
    tokenizer.save_pretrained(tmp_path)
    lm, theirs = EngineLM(small(260, 64)[0], tokenizer), AutoTokenizer.from_pretrained(tmp_path)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    for turns, begins in ((talk[:1], True), (talk, False)):
        expected = theirs.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=begins, continue_final_message=not begins
        )
        assert lm.apply_chat_template(turns, add_generation_prompt=begins) == expected
    assert lm.chat_template(True) == tokenizer.chat_template


def test_lm_eval_chooses_by_sum_by_characters_and_by_bytes() -> None:
    """V16: the three figures of lm-eval choose three answers; ties go to the first."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    docs = [{"choices": [" ab", " 猫猫猫", " abcdefgh"], "gold": gold} for gold in range(3)]
    config = {
        "task": "three", "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
        "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "", "doc_to_choice": "choices",
        "doc_to_target": "gold", "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
    }  # fmt: skip
    task = ConfigurableTask(config=config)
    for sums, expected in (
        ((-1.0, -2.0, -2.7), (0, 2, 1)),
        ((-5.0, -5.0, -5.0), (0, 2, 1)),
        ((0.0, 0.0, 0.0), (0, 0, 0)),
    ):
        right = [task.process_results(doc, [(value, False) for value in sums]) for doc in task.test_docs()]
        for name, chosen in zip(("acc", "acc_norm", "acc_bytes"), expected):
            assert [figures[name] for figures in right] == [float(gold == chosen) for gold in range(3)], (name, sums)
