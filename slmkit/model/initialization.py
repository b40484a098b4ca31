"""Initial weights, and growth of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from slmkit.config import UserError, did_you_mean
from slmkit.model.architectures import architecture_of
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Attention, Decoder


def build_decoder(config: SLMConfig, seed: int = 0, initialization: str = "gpt2") -> Decoder:
    """A decoder with new weights, which depend only on config, `seed` and `initialization`.

    `initialization` is a name in `INITIALIZATIONS`. Raises `UserError` for another one.
    """
    if initialization not in INITIALIZATIONS:
        raise UserError(f"unknown initialization {initialization!r}; {did_you_mean(initialization, INITIALIZATIONS)}")
    decoder = Decoder(architecture_of(config))
    INITIALIZATIONS[initialization](decoder, config, torch.Generator().manual_seed(seed))
    return decoder


def gpt2(decoder: Decoder, config: SLMConfig, generator: torch.Generator) -> None:
    """Normal weights of one standard deviation, scaled down where a block adds to the residual stream (GPT-2)."""
    residual_std = config.initializer_range / (2 * config.num_hidden_layers) ** 0.5
    for name, parameter in decoder.named_parameters():
        if name.endswith(("attention.out.weight", "mlp.down.weight")):
            # Each block adds to the residual stream twice; its variance should not grow with depth.
            nn.init.normal_(parameter, std=residual_std, generator=generator)
        elif parameter.dim() == 2:
            nn.init.normal_(parameter, std=config.initializer_range, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    # Weights of norms keep their neutral values.


def copying(decoder: Decoder, config: SLMConfig, generator: torch.Generator) -> None:
    """Attention that starts as copying, so that a small model soon learns where to attend.

    The output projection starts as the transpose of the value projection: their product is near the identity, and
    with tied embeddings a head then raises the probability of the tokens it attends to (mimetic initialization,
    Trockman & Kolter 2023, arXiv:2305.09828). Larger embeddings keep tokens apart while the first
    steps move all of them in the same direction. With rotary positions, the first two layers start as induction heads.
    """
    gpt2(decoder, config, generator)
    nn.init.normal_(decoder.embedding.weight, std=0.3, generator=generator)
    std = config.hidden_size**-0.5
    attentions = [module for module in decoder.modules() if isinstance(module, Attention)]
    for attention in attentions:
        for projection in (attention.query, attention.key, attention.value):
            nn.init.normal_(projection.weight, std=std, generator=generator)
        with torch.no_grad():
            attention.out.weight.copy_(_of_each_head(attention.value.weight, config).T)
    if decoder.rotary and len(attentions) > 1:
        _induce(decoder, config, attentions[0], attentions[1], generator)


CONSTANT = 1.0  # channel 0 of all embeddings; with tied embeddings it adds the same to all logits
FASTEST = 6  # rotary frequencies that find the previous token
SHARPNESS = 20.0  # attention score of the previous token, before the softmax
GAIN = 2.0  # of the queries and keys that compare tokens
TURNING = 3 / 8  # share of a head's channel pairs that turn too fast to compare tokens a hundred positions apart


@torch.no_grad()
def _induce(
    decoder: Decoder, config: SLMConfig, first: Attention, second: Attention, generator: torch.Generator
) -> None:
    """Two layers that together find what followed the current token before (Olsson et al. 2022, arXiv:2209.11895).

    Every head of the first attends to the previous token, by queries and keys of a channel that is constant, and
    writes that token, turned into other channels. Queries of the second are the current token, keys are what the first
    wrote.
    """
    heads, half, embedding = config.num_attention_heads, config.head_dim // 2, decoder.embedding.weight
    embedding[:, 0] = CONSTANT
    rms = embedding.square().mean(1).sqrt().mean()
    angles = decoder.ropes[0].frequencies()
    strength = torch.where(torch.arange(half) < FASTEST, SHARPNESS / min(FASTEST, half), 0.0)
    # q·k of a pair of channels at a distance of d is size² cos(angle · (d - 1)): keys are turned one position ahead.
    size = (strength / first.scale).sqrt() * rms / CONSTANT
    for projection, pair in ((first.query, (size, 0 * size)), (first.key, (size * angles.cos(), size * angles.sin()))):
        projection.weight.zero_()
        projection.weight[:, 0] = torch.cat(pair).repeat(len(projection.weight) // config.head_dim)
    read, written = (nn.init.orthogonal_(torch.empty_like(first.value.weight), generator=generator) for _ in range(2))
    read[:, 0], written[:, 0] = 0, 0
    first.value.weight.copy_(read)
    first.out.weight.copy_(_of_each_head(written, config).T * rms * config.num_key_value_heads / heads)
    compared = GAIN * (torch.arange(half) >= TURNING * half).float().repeat(2)[:, None]  # [head_dim, 1]
    second.query.weight.copy_((_of_each_head(read, config).unflatten(0, (heads, -1)) * compared).flatten(0, 1))
    second.key.weight.copy_((written.unflatten(0, (-1, config.head_dim)) * compared).flatten(0, 1))


def _of_each_head(value: Tensor, config: SLMConfig) -> Tensor:
    """[kv_heads × head_dim, width] → [heads × head_dim, width]: heads that share a value head repeat it."""
    shared = config.num_attention_heads // config.num_key_value_heads
    return value.unflatten(0, (-1, config.head_dim)).repeat_interleave(shared, 0).flatten(0, 1)


INITIALIZATIONS: dict[str, Callable[[Decoder, SLMConfig, torch.Generator], None]] = {"gpt2": gpt2, "copying": copying}


def grow_vocabulary(
    decoder: Decoder, config: SLMConfig, pieces: Mapping[int, Sequence[int]]
) -> tuple[Decoder, SLMConfig]:
    """The model with rows for further tokens in its embedding, and in its head if untied.

    `pieces` maps each new id to the ids that its spelling was encoded as before. New ids must follow the existing rows
    without a gap, or be in unused rows. A new row is the mean of its pieces' rows, in both matrices, as in Fast
    Vocabulary Transfer (Gee et al. 2022, arXiv:2402.09977): a word means about what its pieces did, and even tokens of
    a chat template differ by their names (`user`, `start`, `end`).

    Predictions change little: a mean of logits exponentiates to the geometric mean of the pieces' probabilities, so
    that before training a new token has no more probability than the mean of its pieces; random rows may take nearly
    all of it (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models", shows this for the mean
    of all rows). No noise is added: the first gradient separates tokens of equal pieces. `benchmarks/growth.py`
    compares it with the mean of all rows and with random ones: after 60 steps on a small model the three are within 1 %
    of one another, and none is ahead on both of its tasks.

    `decoder` is unchanged and shares all but the grown matrices. Raises `UserError` for ids with a gap.
    """
    size = max([config.vocab_size, *(index + 1 for index in pieces)])
    missing = set(range(config.vocab_size, size)) - pieces.keys()
    if missing:
        raise UserError(
            f"token {min(missing):,} is beyond the model's vocabulary of {config.vocab_size:,} and is no new one: "
            "the tokenizer is not this model's"
        )
    grown_config = config.model_copy(update={"vocab_size": size})
    with torch.device("meta"):  # every tensor comes from the decoder
        grown = Decoder(architecture_of(grown_config))
    state = decoder.state_dict()
    for name in ("embedding.weight", "head.weight"):
        if name in state:
            state[name] = _grown(state[name], pieces, size)
    grown.load_state_dict(state, assign=True)
    grown.rotary = decoder.rotary
    grown.train(decoder.training)
    return grown, grown_config


def _grown(weight: Tensor, pieces: Mapping[int, Sequence[int]], size: int) -> Tensor:
    """weight [vocab_size, width] → [size, width], with the mean of its pieces' rows in the row of each new id."""
    rows = torch.cat([weight, weight.new_zeros(size - len(weight), weight.size(1))])
    for index, parts in pieces.items():
        rows[index] = weight[list(parts)].mean(0)
    return rows
