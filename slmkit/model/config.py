"""`SLMConfig`: a model's config, with the names of Hugging Face's `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from slmkit.config import Settings, UserError, did_you_mean, load_settings, read_json_object, read_table, warn_once
from slmkit.files.find import as_path, find_config_directory
from slmkit.model.families import FULL, SLIDING, families_with, family_of, optional_fields
from slmkit.model.files.adapter_directory import config_directory
from slmkit.model.files.generation_config import read_generation_config
from slmkit.model.files.published import expect_depth, from_published, to_published

# The published sizes, and slmkit's own.
PRESETS: dict[str, dict[str, Any]] = read_table(Path(__file__).with_name("presets.yaml"))
# Training fields for short scripts: defaults of the trainer, never written to config.json.
TRAINING_FIELDS = {
    "learning_rate", "batch_size", "sequence_length", "gradient_clip_norm", "warmup_steps", "use_distillation",
    "distillation_alpha", "distillation_temperature", "generation_config",
}  # fmt: skip


# transformers' caches read these for every family: refused, not ignored, for a family without windows here.
WINDOWS = {"layer_types", "sliding_window"}


class SLMConfig(Settings):
    """The shape of a model. Names are those of `transformers`; sizes are counts, not bytes.

    Not every family has every field: one that the family of `model_type` does not read may not be set.
    `rope_parameters` is `{"rope_type": "default", "rope_theta": 10000.0}`, or with another `rope_type` the numbers it
    needs beside it (`dynamic`, `linear`: `factor`; `yarn`, `llama3`: also `original_max_position_embeddings`, …);
    where layers differ in it, such a mapping for each of `full_attention` and `sliding_attention`.
    """

    model_type: str = "llama"  # the family; docs/architectures.md lists them
    vocab_size: int = Field(16_384, gt=0)  # from the tokenizer in a recipe
    hidden_size: int = Field(512, gt=0)  # the width
    intermediate_size: int = Field(1_408, gt=0)  # the width of the MLP
    num_hidden_layers: int = Field(8, gt=0)  # the depth
    num_attention_heads: int = Field(8, gt=0)  # query heads
    # key and value heads
    num_key_value_heads: int = Field(default_factory=lambda values: values["num_attention_heads"], gt=0)
    # width of a head
    head_dim: int = Field(default_factory=lambda values: values["hidden_size"] // values["num_attention_heads"], gt=0)
    max_position_embeddings: int = Field(2_048, gt=0)  # the longest text, in tokens
    hidden_act: str = "silu"  # the MLP's activation
    rms_norm_eps: float = 1e-5  # epsilon of all norms
    # rotary positions, as above
    rope_parameters: dict[str, Any] = Field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10_000.0})
    sliding_window: int | None = Field(None, gt=0)  # positions a query sees in sliding_attention, its own included
    # the kind of each layer; None: all the same
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    no_rope_layers: list[int] | None = None  # for each layer 1 with rotary positions, 0 without
    query_pre_attn_scalar: int | float = Field(256, gt=0)  # attention scores are divided by its square root
    attn_logit_softcapping: float | None = Field(None, gt=0)  # cap of attention scores
    final_logit_softcapping: float | None = Field(None, gt=0)  # cap of the logits
    q_lora_rank: int | None = Field(None, gt=0)  # latent attention, as the next five; None: queries without a low rank
    kv_lora_rank: int = Field(512, gt=0)  # width of the cached latent
    qk_rope_head_dim: int = Field(64, gt=0)  # channels of a head with rotary positions
    qk_nope_head_dim: int = Field(128, gt=0)  # channels of a head without rotary positions
    v_head_dim: int = Field(128, gt=0)  # width of a value head
    rope_interleave: bool = True  # neighbouring channels are rotated as a pair
    norm: Literal["rms", "layer"] = "rms"  # this and the next three: only for model_type slm
    norm_at: Literal["pre", "post", "both"] = "pre"  # before a branch, after it, or both
    qk_norm: Literal["none", "head", "width"] = "none"  # norm of queries and keys
    gated_mlp: bool = True  # SwiGLU or GeGLU instead of a plain MLP
    attention_bias: bool = False  # biases in attention
    mlp_bias: bool = False  # biases in the MLP
    tie_word_embeddings: bool = True  # the head is the embedding
    attention_dropout: float = Field(0.0, ge=0, lt=1)  # dropout of attention weights
    # dropout of the embeddings and of what each branch adds to the residual
    hidden_dropout: float = Field(0.0, ge=0, lt=1)
    initializer_range: float = Field(0.02, gt=0)  # standard deviation of new weights
    bos_token_id: int | None = None  # the token that begins a text
    eos_token_id: int | list[int] | None = None  # the token that ends a text
    pad_token_id: int | None = None  # the token that fills rows

    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(64, gt=0)  # sequences a step
    sequence_length: int | None = Field(  # tokens; where it is not given, no more than the context
        default_factory=lambda values: min(8_192, values.get("max_position_embeddings", 8_192))
    )
    gradient_clip_norm: float = Field(1.0, gt=0)
    warmup_steps: int = Field(2_000, ge=0)
    use_distillation: bool | None = None  # None: where the trainer is given a teacher
    distillation_alpha: float = Field(0.5, ge=0, le=1)  # the share of the labels' cross-entropy in the loss
    distillation_temperature: float = Field(3.0, gt=0)

    generation_config: dict[str, Any] = Field(default_factory=dict)  # what the file of that name says beside the model

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_family(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        expect_depth(given.get("num_hidden_layers", 1))
        plain = {name: field.default for name, field in cls.model_fields.items() if field.default_factory is None}
        family = family_of(given.get("model_type", plain["model_type"]))
        for name, default in family.defaults.items():
            if name not in given:
                given = given | {name: default(plain | given) if callable(default) else default}
        rope = given.get("rope_parameters")
        if family.rope_by_kind and isinstance(rope, dict) and FULL not in rope:
            given = given | {"rope_parameters": {FULL: rope, SLIDING: rope}}
        width, heads = ((plain | given)[name] for name in ("hidden_size", "num_attention_heads"))
        if "head_dim" not in given and isinstance(width, int) and isinstance(heads, int) and heads and width % heads:
            raise ValueError(f"hidden_size ({width}) must be a multiple of num_attention_heads ({heads})")
        return given

    @model_validator(mode="after")
    def _only_fields_of_the_family(self) -> SLMConfig:
        values = self.model_dump()
        for name in sorted(optional_fields() - family_of(self.model_type).fields):
            default = type(self).model_fields[name].get_default(call_default_factory=True, validated_data=values)
            if values[name] != default:
                raise ValueError(
                    f"{name} is {values[name]!r}, which model_type {self.model_type!r} does not have; "
                    f"those that do: {', '.join(families_with(name))}"
                )
        return self

    @model_validator(mode="after")
    def _sizes_must_fit(self) -> SLMConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        fields = family_of(self.model_type).fields
        turning = "qk_rope_head_dim" if "qk_rope_head_dim" in fields else "head_dim"
        if getattr(self, turning) % 2 and "rope_parameters" in fields:
            raise ValueError(
                f"{turning} must be even for RoPE, found {getattr(self, turning)}: change hidden_size or the heads"
            )
        for name in ("layer_types", "no_rope_layers"):
            layers = getattr(self, name)
            if layers is not None and len(layers) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} names {len(layers)} layers, num_hidden_layers is {self.num_hidden_layers}: "
                    "give one entry a layer, or none"
                )
        if SLIDING in (self.layer_types or ()) and self.sliding_window is None:
            raise ValueError("layer_types has sliding_attention and sliding_window is not set: set it, in tokens")
        if self.sequence_length is not None and self.sequence_length > self.max_position_embeddings:
            raise ValueError(
                f"sequence_length ({self.sequence_length}) is longer than max_position_embeddings "
                f"({self.max_position_embeddings}): shorten the one or raise the other"
            )
        return self

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> SLMConfig:
        """One of the published sizes, with any field changed. Raises `UserError` for an unknown name."""
        if name.lower() not in PRESETS:
            raise UserError(f"unknown preset {name!r}; {did_you_mean(name, PRESETS)}")
        return load_settings(cls, PRESETS[name.lower()] | changes, origin=f"preset {name}")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> SLMConfig:
        """Read the `config.json` of a model directory, an adapter's base, a run or a model of the hub, in the spelling
        of transformers 4 or 5.

        Keys that the family's code does not read are ignored, with one warning that lists them. Raises `UserError`
        if the file is missing or invalid, or the model is not supported.
        """
        path = as_path(directory) / "config.json"
        if not path.is_file():
            path = config_directory(find_config_directory(directory)) / "config.json"
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected a model directory, as `slm train` writes it")
        content = read_json_object(path)
        model_type = content.get("model_type")
        if not isinstance(model_type, str):
            raise UserError(f"{path}: no model_type; expected the name of a family, such as 'llama'")
        try:
            content = from_published(content, family_of(model_type))
        except (UserError, ValueError) as error:
            raise UserError(f"{path}: {error}") from None
        except KeyError as error:
            raise UserError(f"{path}: {error.args[0]} is missing") from None
        read = cls.model_fields.keys() - TRAINING_FIELDS - (optional_fields() - family_of(model_type).fields) | WINDOWS
        if ignored := sorted(key for key in content.keys() - read if content[key] not in (None, False)):
            warn_once(f"{path}: ignored, since no {model_type} reads it: {', '.join(ignored)}")
        config = load_settings(cls, {key: content[key] for key in content if key in read}, origin=str(path))
        made_by = ("_from_model_config", "transformers_version")
        given = {key: value for key, value in read_generation_config(path.parent).items() if key not in made_by}
        said_again = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
        given = {key: value for key, value in given.items() if key not in said_again or value != said_again[key]}
        return config.model_copy(update={"generation_config": {} if given == {"do_sample": True} else given})

    def for_generation(self) -> dict[str, Any]:
        """Content of `generation_config.json`: its previous content, and all ids that end a text."""
        given = self.generation_config or {"do_sample": True}
        ends = {*_listed(given.get("eos_token_id")), *_listed(self.eos_token_id)}
        eos = min(ends, default=None) if len(ends) < 2 else sorted(ends)
        pad = given.get("pad_token_id") if self.pad_token_id is None else self.pad_token_id
        return given | {"eos_token_id": eos, "pad_token_id": pad}

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` as transformers 4 and 5, vLLM and llama.cpp's converter read it."""
        path = Path(directory) / "config.json"
        path.write_text(json.dumps(self.published(), indent=2) + "\n", encoding="utf-8")

    @property
    def use_cache(self) -> bool:
        """For transformers' `Trainer`, which sets it; here each call of a decoder is given a cache or none."""
        return True

    @use_cache.setter
    def use_cache(self, value: bool) -> None: ...

    def to_dict(self) -> dict[str, Any]:
        """Content of `config.json`, by the method name that tools for transformers use."""
        return self.published()

    def to_json_string(self) -> str:
        return json.dumps(self.published(), indent=2)

    def get_text_config(self) -> SLMConfig:
        """This config. In transformers' multimodal models, the config of the text model."""
        return self

    def published(self, dtype: str = "float32") -> dict[str, Any]:
        """Content of `config.json` for weights of `dtype`, with both spellings of RoPE and without training fields."""
        family = family_of(self.model_type)
        others = optional_fields() - family.fields
        return to_published(self.model_dump(exclude=TRAINING_FIELDS | others), family) | {"dtype": dtype}


def _listed(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def find_model_or_preset(name: str | Path) -> Path | str:
    """A directory with the config of a model (from the hub: without its weights), or the name of a preset.

    Raises `UserError` for neither.
    """
    preset = str(name).lower()
    if preset in PRESETS and not Path(name).exists():
        return preset
    if Path(name).exists() or "/" in str(name):
        return find_config_directory(name)
    bare = {"".join(filter(str.isalnum, one)): one for one in PRESETS}
    meant = bare.get("".join(filter(str.isalnum, preset)))
    hint = f"did you mean {meant!r}?" if meant else f"presets: {', '.join(sorted(PRESETS))}"
    raise UserError(f"{name}: neither a preset nor a directory; {hint}")
