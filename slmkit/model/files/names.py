"""Names of weights on disk: those of each family's reference implementation, paired with ours.

A table serves both directions; `{}` is the layer's number. Several of our modules under one name are fused there, in
this order. The reference's `post_attention_layernorm` is before the MLP in pre-norm families and after attention in
post-norm families; our names say where a norm is.
"""

from __future__ import annotations

_ENDS = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_MLP = {
    "blocks.{}.mlp.gate": "model.layers.{}.mlp.gate_proj",
    "blocks.{}.mlp.up": "model.layers.{}.mlp.up_proj",
    "blocks.{}.mlp.down": "model.layers.{}.mlp.down_proj",
}
_ATTENTION = {
    "blocks.{}.attention.query": "model.layers.{}.self_attn.q_proj",
    "blocks.{}.attention.key": "model.layers.{}.self_attn.k_proj",
    "blocks.{}.attention.value": "model.layers.{}.self_attn.v_proj",
    "blocks.{}.attention.out": "model.layers.{}.self_attn.o_proj",
}
_LATENT_ATTENTION = {
    "blocks.{}.attention.query": "model.layers.{}.self_attn.q_proj",
    "blocks.{}.attention.query.down": "model.layers.{}.self_attn.q_a_proj",
    "blocks.{}.attention.query.norm": "model.layers.{}.self_attn.q_a_layernorm",
    "blocks.{}.attention.query.up": "model.layers.{}.self_attn.q_b_proj",
    "blocks.{}.attention.latent": "model.layers.{}.self_attn.kv_a_proj_with_mqa",
    "blocks.{}.attention.latent_norm": "model.layers.{}.self_attn.kv_a_layernorm",
    "blocks.{}.attention.key_value": "model.layers.{}.self_attn.kv_b_proj",
    "blocks.{}.attention.out": "model.layers.{}.self_attn.o_proj",
}
_QK_NORMS = {
    "blocks.{}.attention.query_norm": "model.layers.{}.self_attn.q_norm",
    "blocks.{}.attention.key_norm": "model.layers.{}.self_attn.k_norm",
}
_PRE_NORMS = {
    "blocks.{}.attention_in": "model.layers.{}.input_layernorm",
    "blocks.{}.mlp_in": "model.layers.{}.post_attention_layernorm",
}
_POST_NORMS = {
    "blocks.{}.attention_out": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.mlp_out": "model.layers.{}.post_feedforward_layernorm",
}
_FOUR_NORMS = _POST_NORMS | {
    "blocks.{}.attention_in": "model.layers.{}.input_layernorm",
    "blocks.{}.mlp_in": "model.layers.{}.pre_feedforward_layernorm",
}

LLAMA = _ENDS | _ATTENTION | _MLP | _PRE_NORMS
QWEN3 = LLAMA | _QK_NORMS
OLMO2 = _ENDS | _ATTENTION | _MLP | _POST_NORMS | _QK_NORMS
GEMMA2 = _ENDS | _ATTENTION | _MLP | _FOUR_NORMS
GEMMA3 = GEMMA2 | _QK_NORMS
DEEPSEEK = _ENDS | _LATENT_ATTENTION | _MLP | _PRE_NORMS
SLM = GEMMA3  # for any placement of norms
GPT2 = {
    "embedding": "transformer.wte",
    "place": "transformer.wpe",
    "blocks.{}.attention_in": "transformer.h.{}.ln_1",
    "blocks.{}.attention.query": "transformer.h.{}.attn.c_attn",
    "blocks.{}.attention.key": "transformer.h.{}.attn.c_attn",
    "blocks.{}.attention.value": "transformer.h.{}.attn.c_attn",
    "blocks.{}.attention.out": "transformer.h.{}.attn.c_proj",
    "blocks.{}.mlp_in": "transformer.h.{}.ln_2",
    "blocks.{}.mlp.up": "transformer.h.{}.mlp.c_fc",
    "blocks.{}.mlp.down": "transformer.h.{}.mlp.c_proj",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
GPT2_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
