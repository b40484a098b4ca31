"""The page of a Space: a chat with the model in `model`, or a text that it continues if it has no chat template.

Needs only gradio, torch and transformers. Run it on any machine with `python app.py`.
"""

from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import gradio
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

MODEL = Path(__file__).parent / "model"
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, device_map="auto" if torch.cuda.is_available() else None)
context = model.config.max_position_embeddings
settings = [
    gradio.Slider(0, 2, value=0.7, step=0.05, label="Temperature (0: always the likeliest token)"),
    gradio.Slider(0.05, 1, value=0.95, step=0.05, label="Top p"),
    gradio.Slider(1, context - 1, value=min(256, context // 2), step=1, label="New tokens, at most"),
]


def stream(ids: torch.Tensor, temperature: float, top_p: float, new_tokens: int) -> Iterator[str]:
    """The text after ids [1, tokens], longer from one to the next."""
    room = context - ids.shape[1]
    if room < 1:
        raise gradio.Error(f"This is longer than the model's context of {context:,} tokens: make it shorter.")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    problems: list[Exception] = []

    def generate() -> None:
        try:
            model.generate(ids, streamer=streamer, max_new_tokens=min(int(new_tokens), room), **sampling)
        except Exception as problem:
            problems.append(problem)
            streamer.end()  # else the page waits for ever

    Thread(target=generate, daemon=True).start()
    text = ""
    for part in streamer:
        text += part
        yield text
    if problems:
        raise gradio.Error(f"The model failed: {problems[0]}")


def text_of(content: Any) -> str:
    """The text of a message in the page's history."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def answer(
    message: str, history: list[dict[str, Any]], temperature: float, top_p: float, new_tokens: int
) -> Iterator[str]:
    """The model's answer to `message` after the conversation in `history`."""
    messages = [{"role": one["role"], "content": text_of(one["content"])} for one in history]
    messages.append({"role": "user", "content": message})
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    yield from stream(prompt["input_ids"].to(model.device), temperature, top_p, new_tokens)


def go_on(text: str, temperature: float, top_p: float, new_tokens: int) -> Iterator[str]:
    """The text and what the model writes after it."""
    ids = tokenizer(text or tokenizer.eos_token, return_tensors="pt")["input_ids"].to(model.device)
    for more in stream(ids, temperature, top_p, new_tokens):
        yield text + more


title = MODEL.parent.name
if tokenizer.chat_template:
    page = gradio.ChatInterface(answer, title=title, additional_inputs=settings, api_name="chat")
else:
    page = gradio.Interface(
        go_on,
        [gradio.Textbox(label="Text", lines=5), *settings],
        gradio.Textbox(label="Continued", lines=10),
        title=title,
        api_name="continue",
        flagging_mode="never",
    )

if __name__ == "__main__":
    page.launch()
