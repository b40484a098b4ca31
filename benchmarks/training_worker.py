"""One configuration of `benchmarks.training` in a process of its own: steps on given batches from given weights.

python training_worker.py SPEC.json        # prints its losses, seconds of each step and peak memory as a line of JSON

It imports only what its peer needs, so that its memory is that peer's, and so that a peer may live in another Python
environment. Every peer but slmkit, which has its own, is driven by the same loop.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]  # ids and labels [rows, length] → mean loss []


def plain(directory: Path, length: int) -> tuple[nn.Module, Loss]:
    """`benchmarks/plain_loop.py`."""
    from benchmarks.plain_loop import load_plain

    def loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())

    return load_plain(directory, length), loss


def transformers(directory: Path, length: int) -> tuple[nn.Module, Loss]:
    """`transformers`, with its own loss; in float32, as its Trainer does unless it is told otherwise."""
    from transformers import AutoModelForCausalLM

    def loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
        return model(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False).loss

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), loss


def litgpt(directory: Path, length: int) -> tuple[nn.Module, Loss]:
    """`litgpt`, with its own model, conversion and chunked loss."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy

    c = json.loads((directory / "config.json").read_text())
    config = Config(
        block_size=length, n_layer=c["num_hidden_layers"], n_embd=c["hidden_size"], n_head=c["num_attention_heads"],
        n_query_groups=c["num_key_value_heads"], vocab_size=c["vocab_size"], padded_vocab_size=c["vocab_size"],
        rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
        norm_eps=c["rms_norm_eps"], mlp_class_name="LLaMAMLP", intermediate_size=c["intermediate_size"],
        rope_base=int(c["rope_theta"]),
    )  # fmt: skip
    model, state = GPT(config), dict[str, Tensor]()
    copy_weights_hf_llama(config, {}, state, dict(load_file(directory / "model.safetensors")))
    model.load_state_dict(state)
    model.lm_head.weight = model.transformer.wte.weight  # tied, as in the model directory

    def loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
        return chunked_cross_entropy(model(ids), labels)

    return model, loss


PEERS: dict[str, Callable[[Path, int], tuple[nn.Module, Loss]]] = {
    "plain": plain,
    "transformers": transformers,
    "litgpt": litgpt,
}


def by_loop(spec: dict[str, Any], batches: Tensor) -> tuple[list[float], list[float]]:
    """Losses and seconds of every step of a peer.  batches [steps, rows, length + 1]

    With `spec["limit"]` it stops once the steps after the first have taken that many seconds.
    """
    from benchmarks.plain_loop import adamw

    device = torch.device(spec["device"])
    model, loss = PEERS[spec["peer"]](Path(spec["model"]), batches.size(2) - 1)
    model.to(device).train()
    optimizer = adamw(model.parameters(), spec["optimizer"])
    run = torch.compile(model) if spec["compile"] else model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=spec["precision"] == "bfloat16")
    losses, seconds = list[float](), list[float]()
    for batch in batches:
        began, total = time.perf_counter(), 0.0
        optimizer.zero_grad(set_to_none=True)
        for rows in batch.to(device).split(spec["micro_batch"]):
            with autocast:
                value = loss(run, rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) * (len(rows) / len(batch))
            value.backward()
            total += value.detach()
        nn.utils.clip_grad_norm_(model.parameters(), spec["max_grad_norm"])
        optimizer.step()
        losses.append(float(total))
        seconds.append(time.perf_counter() - began)
        if sum(seconds[1:]) > spec.get("limit", math.inf):
            break
    return losses, seconds


def by_slmkit(spec: dict[str, Any], batches: Tensor) -> tuple[list[float], list[float]]:
    """The same of slmkit's own loop."""
    from slmkit.data.batch import Batch
    from slmkit.device import find_device
    from slmkit.model.files.directory import load_decoder
    from slmkit.training.estimate.micro_batch import with_usual_micro_batch
    from slmkit.training.fit import fresh_state
    from slmkit.training.loop import Plan, train_step
    from slmkit.training.objective import next_token
    from slmkit.training.recipe.recipe import Recipe, TrainSettings

    device, length, rates = find_device(spec["device"], spec["precision"]), batches.size(2) - 1, spec["optimizer"]
    tokens, at_once = batches.size(1) * length, spec["micro_batch"]  # None: as many rows as slmkit takes by itself
    settings = TrainSettings(
        sequence_length=length, tokens_per_step=tokens, micro_batch_tokens=at_once and at_once * length,
        compile=spec["compile"], precision=spec["precision"], learning_rate=rates["lr"], adam_epsilon=rates["eps"],
        adam_beta1=rates["betas"][0], adam_beta2=rates["betas"][1], weight_decay=rates["weight_decay"],
    )  # fmt: skip
    decoder = load_decoder(spec["model"])[0]
    settings = with_usual_micro_batch(settings, decoder.architecture.width, device)
    state = fresh_state(Recipe(train=settings), decoder, device)
    state.model.train()
    plan = Plan(len(batches), settings.rows_per_micro_batch(length), spec["max_grad_norm"], lambda step: 1.0, device)
    losses, seconds = list[float](), list[float]()
    for ids in batches:
        began = time.perf_counter()
        batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), tokens)
        losses.append(train_step(state, next_token, batch, plan)["loss"])
        seconds.append(time.perf_counter() - began)
    return losses, seconds


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    batches = load_file(spec["batches"])["ids"][: spec["steps"]]
    train = by_slmkit if spec["peer"] == "slmkit" else by_loop
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with profiler if spec.get("profile") else contextlib.nullcontext():
        losses, seconds = train(spec, batches)
    if spec["device"].startswith("cuda"):
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"losses": losses, "seconds": seconds, "peak_bytes": peak}
    print(json.dumps(found | ({"profile": shares(profiler)} if spec.get("profile") else {})))


def shares(profiler: torch.profiler.profile) -> dict[str, float]:
    """Each operation's share of the time of all, without the operations that it calls; those above half a percent."""
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    whole = sum(times.values())
    largest = sorted(times.items(), key=lambda item: -item[1])
    return {name: round(time / whole, 4) for name, time in largest if time > 0.005 * whole}


if __name__ == "__main__":
    main()
