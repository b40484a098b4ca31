"""Generates: python generate.py "Once upon a time". Needs onnxruntime, tokenizers and numpy."""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer, decoders

options = argparse.ArgumentParser(description=__doc__)
options.add_argument("prompt")
options.add_argument("--chat", action="store_true", help="the prompt is a message, to be answered")
options.add_argument("--max-new-tokens", type=int, default=100)
options.add_argument("--temperature", type=float, default=0, help="0: always the likeliest token")
given, folder = options.parse_args(), Path(__file__).parent
if given.chat and not (folder / "chat_prompt.json").exists():
    options.error("--chat: this model has no chat template")
tokenizer, stream = Tokenizer.from_file(str(folder / "tokenizer.json")), decoders.DecodeStream()
ends = json.loads((folder / "generation_config.json").read_text("utf-8"))["eos_token_id"]
known = sorted(tokenizer.get_vocab().values())  # the model may have rows of no token
before, after = json.loads((folder / "chat_prompt.json").read_text("utf-8")) if given.chat else ("", "")
fresh = tokenizer.encode(before + given.prompt + after, add_special_tokens=not given.chat).ids or ends[:1]
session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
asked = {one.name: one for one in session.get_inputs()}
types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}  # of keys and values
past = {k: np.zeros((1, v.shape[1], 0, v.shape[3]), types[v.type]) for k, v in asked.items() if v.type in types}
seen, context = 0, int(session.get_modelmeta().custom_metadata_map["slmkit.context"])
if len(fresh) > context:
    options.error(f"the prompt has {len(fresh)} tokens, more than the context of {context}")
for _ in range(min(given.max_new_tokens, context - len(fresh) + 1)):
    read = {"input_ids": np.array([fresh]), "position_ids": np.arange(seen, seen + len(fresh))[None]}
    seen += len(fresh)
    read |= past | {"attention_mask": np.ones((1, seen), np.int64)}
    logits, *present = session.run(None, {name: read[name] for name in asked})
    past, scores = dict(zip(past, present)), logits[0, -1, known]
    fresh = [known[(scores + given.temperature * np.random.gumbel(size=scores.shape)).argmax()]]  # a softmax's draw
    if fresh[0] in ends:
        break
    print(stream.step(tokenizer, fresh[0]) or "", end="", flush=True)  # whole characters
print()
