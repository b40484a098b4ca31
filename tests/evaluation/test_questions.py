"""An answer counts when it is right word for word, and only then."""

from __future__ import annotations

import pytest

from slmkit.data.rows.datasets import TextDataset
from slmkit.data.stream import Stream
from slmkit.evaluation import ask
from slmkit.evaluation.questions import Answer, QuestionReport
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.loop import train
from slmkit.training.objective import next_token
from tests.training.helpers import plan, state

TOKENIZER = SLMTokenizer(260)
PAIRS = {"Who has the kite?": "The fox.", "Who has the drum?": "An owl."}


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module")
def parrot() -> Decoder:
    """A model that has learned two answers by heart."""
    chats = [[*asked(question), {"role": "assistant", "content": answer}] for question, answer in PAIRS.items()]

    class Rendered:
        """What the chat template writes, special tokens and all, for a data set of plain texts."""

        eos_token_id, pad_token_id = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id

        def encode(self, text: str) -> list[int]:
            return TOKENIZER.encode_chat(chats[int(text)]).ids

        def __len__(self) -> int:
            return len(TOKENIZER)

    learner = state()
    learner.model = build_decoder(
        SLMConfig(vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                  max_position_embeddings=128, initializer_range=0.1)
    )  # fmt: skip
    from slmkit.training.optimizers.choose import adamw
    from tests.training.helpers import settings

    learner.optimizers = adamw(learner.model, settings())
    train(learner, next_token, Stream(TextDataset(["0", "1"], Rendered(), max_length=100), 2), plan(120))
    return learner.model


def test_right_answers_are_right_and_wrong_ones_wrong(parrot: Decoder) -> None:
    questions = [(asked(question), answer) for question, answer in PAIRS.items()]
    questions.append((asked("Who has the kite?"), "The fox has it."))
    report = ask(parrot, TOKENIZER, questions)
    assert [answer.given for answer in report.answers] == ["The fox.", "An owl.", "The fox."]
    assert report.share_right == pytest.approx(2 / 3)


def test_a_story_that_fills_the_context_counts_as_wrong_and_is_not_left_out(parrot: Decoder) -> None:
    report = ask(parrot, TOKENIZER, [(asked("x" * 200), "y")])
    assert len(report.answers) == 1
    assert report.share_right == 0


def test_case_and_words_matter_and_space_around_does_not() -> None:
    assert Answer("?", "The fox.", " The fox. ").is_right
    assert not Answer("?", "The fox.", "the fox.").is_right
    assert not Answer("?", "The fox.", "The fox").is_right


def test_the_share_has_its_standard_error() -> None:
    answers = tuple(Answer("?", "a", "a" if i < 80 else "b") for i in range(100))
    assert QuestionReport(answers).share_right == 0.8
    assert QuestionReport(answers).standard_error == pytest.approx(0.04)
