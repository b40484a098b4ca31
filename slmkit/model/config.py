"""`SLMConfig`: what a user writes and what `config.json` holds, in Hugging Face's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from slmkit.config import Settings, UserError, did_you_mean, load_settings

# Fields for a five-line training script: defaults of the trainer, no property of the model, never in config.json.
TRAINING_FIELDS = {"learning_rate", "batch_size", "sequence_length", "gradient_clip_norm", "warmup_steps"}

# Keys of a published config.json that say nothing about what the model computes.
HARMLESS_KEYS = {
    "_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder",
    "label2id", "output_attentions", "output_hidden_states", "pretraining_tp", "problem_type", "return_dict",
    "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


class SLMConfig(Settings):
    """The shape of a model. Names are those of `transformers`; sizes are counts, not bytes.

    `rope_parameters` is `{"rope_type": "default", "rope_theta": 10000.0}` or, for Llama 3's scaling,
    `{"rope_type": "llama3", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings"}`.
    """

    model_type: str = "llama"
    vocab_size: int = Field(16_384, gt=0)
    hidden_size: int = Field(512, gt=0)
    intermediate_size: int = Field(1_408, gt=0)
    num_hidden_layers: int = Field(8, gt=0)
    num_attention_heads: int = Field(8, gt=0)
    num_key_value_heads: int = Field(default_factory=lambda values: values["num_attention_heads"], gt=0)
    head_dim: int = Field(default_factory=lambda values: values["hidden_size"] // values["num_attention_heads"], gt=0)
    max_position_embeddings: int = Field(2_048, gt=0)
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    rope_parameters: dict[str, Any] = Field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10_000.0})
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = True
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    hidden_dropout: float = Field(0.0, ge=0, lt=1)  # on the embeddings and on what each branch adds to the residual
    initializer_range: float = Field(0.02, gt=0)
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(8, gt=0)  # sequences a step
    sequence_length: int | None = None  # tokens; None: max_position_embeddings
    gradient_clip_norm: float = Field(1.0, gt=0)
    warmup_steps: int = Field(100, ge=0)

    @model_validator(mode="after")
    def _heads_must_fit(self) -> SLMConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, found {self.head_dim}: change hidden_size or the heads")
        if self.sequence_length is not None and self.sequence_length > self.max_position_embeddings:
            raise ValueError(
                f"sequence_length ({self.sequence_length}) is longer than max_position_embeddings "
                f"({self.max_position_embeddings}): shorten the one or raise the other"
            )
        return self

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> SLMConfig:
        """One of the published sizes, with any field changed. Raises `UserError` for an unknown name."""
        if name not in PRESETS:
            raise UserError(f"unknown preset {name!r}; {did_you_mean(name, PRESETS)}")
        return load_settings(cls, PRESETS[name] | changes, origin=f"preset {name}")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> SLMConfig:
        """Read the `config.json` of a model directory, in the spelling of transformers 4 or 5.

        Raises `UserError` where the file is missing or broken, or holds a key that this class would have to ignore.
        """
        path = Path(directory) / "config.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; expected a model directory, as `slm train` writes it") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable config.json: {error}") from None
        if not isinstance(content, dict):
            raise UserError(f"{path}: not a readable config.json: expected an object, found {type(content).__name__}")
        return load_settings(cls, _from_published(content), origin=str(path))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` as transformers 4 and 5, vLLM and llama.cpp's converter read it."""
        path = Path(directory) / "config.json"
        path.write_text(json.dumps(self.published(), indent=2) + "\n", encoding="utf-8")

    def published(self) -> dict[str, Any]:
        """The content of `config.json`: RoPE is written both ways, training fields not at all."""
        content = self.model_dump(exclude=TRAINING_FIELDS)
        rope = self.rope_parameters
        content["rope_theta"] = rope["rope_theta"]
        scaled = rope["rope_type"] != "default"
        content["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"} if scaled else None
        return {"architectures": ["LlamaForCausalLM"], "dtype": "float32", "use_cache": True, **content}


def _from_published(content: dict[str, Any]) -> dict[str, Any]:
    """Fold the older `rope_theta` and `rope_scaling` into `rope_parameters`; drop what does not change the model."""
    content = {key: value for key, value in content.items() if key not in HARMLESS_KEYS}
    theta, scaling = content.pop("rope_theta", None), content.pop("rope_scaling", None)
    rope = dict(content.get("rope_parameters") or scaling or {})
    if "type" in rope:  # transformers before 4.43
        rope["rope_type"] = rope.pop("type")
    content["rope_parameters"] = {"rope_type": "default", "rope_theta": theta or 10_000.0} | rope
    for name in ("head_dim", "num_key_value_heads"):  # published as null where it follows from the others
        if content.get(name) is None:
            content.pop(name, None)
    return content


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8_192,
}

PRESETS: dict[str, dict[str, Any]] = {
    # 1.4 M parameters: learns the built-in stories in minutes on two CPU cores. Nearly every word of theirs is one
    # token of 4,096, and heads of 64 channels take a fifth less time there than heads of 32.
    "quickstart": {
        "vocab_size": 4_096, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 2, "max_position_embeddings": 512,
    },
    "vector-slm": {
        "vocab_size": 16_384, "hidden_size": 768, "intermediate_size": 2_048, "num_hidden_layers": 16,
        "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 1_024,
    },
    "vector-clm-50m": {
        "vocab_size": 16_384, "hidden_size": 512, "intermediate_size": 1_408, "num_hidden_layers": 14,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1_024,
    },
    "smollm2-135m": {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1_536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8_192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        "bos_token_id": 0, "eos_token_id": 0,
    },
    "llama-3.2-1b": {
        "vocab_size": 128_256, "hidden_size": 2_048, "intermediate_size": 8_192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
        "rope_parameters": _LLAMA3_ROPE, "bos_token_id": 128_000, "eos_token_id": 128_001,
    },
}  # fmt: skip
