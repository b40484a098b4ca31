"""A row of every public schema that is read, and what it means; for tests that go through all of them."""

from __future__ import annotations

import json
from typing import Any, NamedTuple


class Schema(NamedTuple):
    """`row` as a data set has it; `means` the conversation, or of a pair both."""

    row: dict[str, Any]
    means: Any
    tools: list[dict[str, Any]] | None = None


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def say(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Be kind."}
TALK = [user("Hi"), say("Hello.")]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
FUNCTION = {
    "name": "find",
    "description": "Finds.",
    "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "rain"}}}
CALLED = [
    user("Rain?"), say("", tool_calls=[CALL]), {"role": "tool", "content": '{"rain": true}'}, say("It rains."),
]  # fmt: skip
THOUGHT = [user("2+3?"), say("5", reasoning_content="Two and three.")]

CHATS: dict[str, Schema] = {
    "messages": Schema({"messages": [SYSTEM, *TALK]}, [SYSTEM, *TALK]),
    "messages with a system column": Schema({"messages": TALK, "system": "Be kind."}, [SYSTEM, *TALK]),
    "messages in parts": Schema(
        {"messages": [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in TALK]}, TALK
    ),
    "messages as JSON": Schema({"messages": json.dumps(TALK)}, TALK),
    "OpenAI tools": Schema(
        {
            "messages": [
                CALLED[0],
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"what": "rain"}'}}
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": '{"rain": true}'},
                CALLED[3],
            ],
            "tools": TOOLS,
        },
        [CALLED[0], say("", tool_calls=[{"id": "c1", **CALL}]), {**CALLED[2], "tool_call_id": "c1"}, CALLED[3]],
        TOOLS,
    ),
    "OpenAI functions, as they were": Schema(
        {
            "messages": [
                CALLED[0],
                {"role": "assistant", "content": None, "function_call": CALL["function"]},
                {"role": "function", "name": "find", "content": '{"rain": true}'},
                CALLED[3],
            ],
            "functions": [FUNCTION],
        },
        [*CALLED[:2], {**CALLED[2], "name": "find"}, CALLED[3]],
        TOOLS,
    ),
    "reasoning": Schema({"messages": [THOUGHT[0], {**say("5"), "reasoning": "Two and three."}]}, THOUGHT),
    "thinking": Schema({"messages": [THOUGHT[0], {**say("5"), "thinking": "Two and three."}]}, THOUGHT),
    "ShareGPT": Schema({"conversations": SHAREGPT}, TALK),
    "ShareGPT with system and tools": Schema(
        {
            "conversations": [
                {"from": "human", "value": "Rain?"},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": '{"rain": true}'},
                {"from": "gpt", "value": "It rains."},
            ],
            "system": "Be kind.",
            "tools": json.dumps([FUNCTION]),
        },
        [SYSTEM, *CALLED],
        TOOLS,
    ),
    "ShareGPT with other names": Schema(
        {"conversation": [{"from": "user", "value": "Hi"}, {"from": "chatgpt", "value": "Hello."}]}, TALK
    ),
    "SlimOrca": Schema(
        {
            "conversations": [
                {"from": "system", "value": "Be kind.", "weight": None},
                {"from": "human", "value": "Hi", "weight": 0.0},
                {"from": "gpt", "value": "Hello.", "weight": 1.0},
            ]
        },
        [SYSTEM, {**TALK[0], "weight": 0.0}, {**TALK[1], "weight": 1.0}],
    ),
    "Alpaca": Schema(
        {"instruction": "Add.", "input": "1, 2", "output": "3"}, [user("Add.\n\n1, 2"), say("3")]
    ),
    "Alpaca with system and history": Schema(
        {"instruction": "And?", "input": "", "output": "Good.", "system": "Be kind.", "history": [["Hi", "Hello."]]},
        [SYSTEM, *TALK, user("And?"), say("Good.")],
    ),
    "Dolly": Schema(
        {"instruction": "Who?", "context": "Ann ran.", "response": "Ann."}, [user("Who?\n\nAnn ran."), say("Ann.")]
    ),
    "prompt and completion": Schema({"prompt": "Hi", "completion": "Hello."}, TALK),
    "prompt and completion of messages": Schema({"prompt": TALK[:1], "completion": TALK[1:]}, TALK),
    "prompt and response": Schema({"prompt": "Hi", "response": "Hello."}, TALK),
    "question and answer": Schema({"question": "Hi", "answer": "Hello."}, TALK),
    "question, context and answer": Schema(
        {"question": "Who?", "context": "Ann ran.", "answer": "Ann."}, [user("Who?\n\nAnn ran."), say("Ann.")]
    ),
    "question, reasoning and answer": Schema(
        {"question": "2+3?", "reasoning": "Two and three.", "answer": "5"}, THOUGHT
    ),
    "input and output": Schema({"input": "Hi", "output": "Hello."}, TALK),
    "query and response": Schema({"query": "Hi", "response": "Hello."}, TALK),
    "query and answer": Schema({"query": "Hi", "answer": "Hello."}, TALK),
    "question and response": Schema({"question": "Hi", "response": "Hello."}, TALK),
    "instruction and answer": Schema({"instruction": "Hi", "answer": "Hello."}, TALK),
    "problem and solution": Schema({"problem": "Hi", "solution": "Hello."}, TALK),
}  # fmt: skip

GOOD, BAD = [*TALK[:1], say("Good.")], [*TALK[:1], say("Bad.")]
PAIRS: dict[str, Schema] = {
    "prompt, chosen, rejected": Schema({"prompt": "Hi", "chosen": "Good.", "rejected": "Bad."}, (GOOD, BAD)),
    "whole conversations": Schema({"chosen": GOOD, "rejected": BAD}, (GOOD, BAD)),
    "trl, conversational": Schema({"prompt": TALK[:1], "chosen": GOOD[1:], "rejected": BAD[1:]}, (GOOD, BAD)),
    "ShareGPT pairs": Schema(
        {
            "conversations": SHAREGPT[:1],
            "chosen": {"from": "gpt", "value": "Good."},
            "rejected": {"from": "gpt", "value": "Bad."},
        },
        (GOOD, BAD),
    ),
    "Intel/orca_dpo_pairs": Schema(
        {"system": "Be kind.", "question": "Hi", "chosen": "Good.", "rejected": "Bad."},
        ([SYSTEM, *GOOD], [SYSTEM, *BAD]),
    ),
    "Alpaca pairs": Schema(
        {"instruction": "Hi", "input": "", "chosen": "Good.", "rejected": "Bad."}, (GOOD, BAD)
    ),
    "two outputs": Schema({"instruction": "Hi", "input": "", "output": ["Good.", "Bad."]}, (GOOD, BAD)),
    "stack-exchange-paired": Schema({"question": "Hi", "response_j": "Good.", "response_k": "Bad."}, (GOOD, BAD)),
    "PKU-SafeRLHF": Schema(
        {"prompt": "Hi", "response_0": "Bad.", "response_1": "Good.", "better_response_id": 1, "safer_response_id": 0},
        (GOOD, BAD),
    ),
    "ms-swift": Schema({"messages": GOOD, "rejected_response": "Bad."}, (GOOD, BAD)),
    "ms-swift, query": Schema({"query": "Hi", "response": "Good.", "rejected_response": "Bad."}, (GOOD, BAD)),
    "UltraFeedback": Schema(
        {
            "instruction": "Hi",
            "completions": [
                {"response": "So so.", "overall_score": 5.0, "fine-grained_score": 9.0},
                {"response": "Good.", "overall_score": 8.5, "fine-grained_score": 4.0},
                {"response": "Bad.", "overall_score": 1.0, "fine-grained_score": 4.0},
            ],
        },
        (GOOD, BAD),
    ),
    "Nectar": Schema(
        {"prompt": "Hi", "answers": [{"answer": "Bad.", "rank": 2.0}, {"answer": "Good.", "rank": 1.0}]}, (GOOD, BAD)
    ),
}  # fmt: skip
JUDGED: dict[str, Schema] = {
    "trl": Schema({"prompt": "Hi", "completion": "Hello.", "label": False}, TALK),
    "trl, conversational": Schema({"prompt": TALK[:1], "completion": TALK[1:], "label": False}, TALK),
    "messages": Schema({"messages": TALK, "label": False}, TALK),
    "LLaMA-Factory": Schema({"conversations": SHAREGPT, "kto_tag": False}, TALK),
    "Alpaca": Schema({"instruction": "Hi", "input": "", "output": "Hello.", "kto_tag": False}, TALK),
}
TEXTS: dict[str, Schema] = {
    "text": Schema({"text": "Once."}, "Once."),
    "Tiny-Codes": Schema({"prompt": "Sort a list.", "response": "sorted(a)"}, "Sort a list.\n\nsorted(a)"),
}
ALL = {
    f"{reads}: {name}": (reads, schema)
    for reads, schemas in (
        ("text", TEXTS), ("conversations", CHATS), ("pairs", PAIRS), ("judgements", JUDGED),
    )
    for name, schema in schemas.items()
}  # fmt: skip

# The rows of data sets that recipes name, with the columns that are not used.
OF_RECIPES: dict[str, Schema] = {
    "HuggingFaceTB/smoltalk": Schema({"messages": [SYSTEM, *TALK], "source": "everyday"}, [SYSTEM, *TALK]),
    "Open-Orca/SlimOrca": CHATS["SlimOrca"],
    "allenai/tulu-3-sft-personas-code": Schema({"id": "1", "prompt": "Hi", "messages": TALK}, TALK),
    "tatsu-lab/alpaca": Schema({**CHATS["Alpaca"].row, "text": "Below is an instruction …"}, CHATS["Alpaca"].means),
}
