"""A tokenizer small enough to check by hand: a byte is a token. It stands where the tests mean any tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slmkit.tokenizer.encoder import ChatRow


@dataclass
class EncodedChat:
    ids: list[int]
    trained: list[bool]


class ByteTokenizer:
    """Bytes are 0 to 255, then end of text, padding, and one token in front of each side's turn."""

    eos_token_id, pad_token_id, user_id, assistant_id = 256, 257, 258, 259

    def __init__(self, size: int = 260, fingerprint: str = "bytes" * 8) -> None:
        self.size, self.fingerprint = size, fingerprint

    def __len__(self) -> int:
        return self.size

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: list[str], threads: int | None = None) -> list[np.ndarray]:
        return [np.array(self.encode(text), dtype=np.uint32) for text in texts]

    def render_chat(self, messages: list[dict[str, str]], tools: None = None) -> list[list[dict[str, str]]]:
        return [messages]

    def encode_rendered(self, chats: list[list], threads: int | None = None) -> list[list[ChatRow]]:
        encoded = [self.encode_chat(messages) for (messages,) in chats]
        return [[ChatRow(np.array(one.ids, dtype=np.uint32), np.array(one.trained, dtype=bool))] for one in encoded]

    def check_losses(self) -> None:
        """Every text is bytes: none is lost."""

    def encode_chat(self, messages: list[dict[str, str]]) -> EncodedChat:
        """What the assistant says is learned; who speaks is not."""
        ids: list[int] = []
        trained: list[bool] = []
        for message in messages:
            said, is_assistant = self.encode(message["content"]), message["role"] == "assistant"
            ids += [self.assistant_id if is_assistant else self.user_id, *said]
            trained += [False] + [is_assistant] * len(said)
        return EncodedChat(ids, trained)


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
