"""LoRA: a frozen model with a trained product of two small matrices added to its linears.

    y = x W^T + s (x A^T) B^T                                   A [r, in], B [out, r], s = lora_alpha / r

B starts at zero, so that an adapted model starts equal to its base (Hu et al. 2021, arXiv:2106.09685). rsLoRA divides
by √r instead of r, which keeps the update's size at larger ranks (Kalajdzievski 2023, arXiv:2312.03732). DoRA learns
the norm of each row of W + s B A separately from its direction (Liu et al. 2024, arXiv:2402.09353).

The frozen matrices may be quantized, and are dequantized only for each product (QLoRA, Dettmers et al. 2023,
arXiv:2305.14314). Gradients go to a linear's input and never to its matrix; the backward pass dequantizes it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slmkit.adapt.adapter_config import modules_and_weights
from slmkit.adapt.quantize import Product, Quantized, expect_full
from slmkit.adapt.swapping import ALL_LINEAR, LinearLike, matching, replace, swap
from slmkit.config import UserError
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.families import family_of
from slmkit.model.files.adapter_directory import LoRASettings
from slmkit.model.files.directory import reference_name
from slmkit.model.kernels import NF4_VALUES

BLOCK = 64  # weights per scale in NF4


class LoRALinear(nn.Module):
    """A frozen linear with a low-rank update."""

    def __init__(self, base: LinearLike, r: int, scale: float, dropout: float = 0.0) -> None:
        """Freezes `base`. A and B are zero until `initialise`."""
        super().__init__()
        self.base: LinearLike = base.requires_grad_(False)
        self.scale, self.in_features, self.out_features = scale, base.in_features, base.out_features
        self.lora_A = nn.Parameter(base.weight.new_zeros(r, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, r))
        self.dropout = nn.Dropout(dropout)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw A as in `peft`, uniform within ±1/√in; B stays zero."""
        drawn = torch.empty(self.lora_A.shape).uniform_(-1, 1, generator=generator) / self.lora_A.size(1) ** 0.5
        with torch.no_grad():
            self.lora_A.copy_(drawn)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        return self.base(x) + self.update(x)

    def update(self, x: Tensor) -> Tensor:
        """s (x A^T) B^T, with dropout on x in training.  [..., in] → [..., out]"""
        return F.linear(F.linear(self.dropout(x), self.lora_A) * self.scale, self.lora_B)

    @property
    def weight(self) -> Tensor:
        """W + s B A.  [out, in]"""
        return self.base.weight + self.scale * self.lora_B @ self.lora_A

    @property
    def bias(self) -> Tensor | None:  # [out]
        return self.base.bias


class DoRALinear(LoRALinear):
    """As LoRALinear, with `magnitude` [out]: the learned norm of each row of the sum."""

    def __init__(self, base: LinearLike, r: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base, r, scale, dropout)
        lengths = base.weight.detach().norm(dim=1)
        self.magnitude = nn.Parameter(lengths.clone())
        self.squares: Tensor
        self.register_buffer("squares", lengths.square(), persistent=False)  # squared norms of the frozen rows

    def forward(self, x: Tensor) -> Tensor:  # [..., in] → [..., out]
        plain = self.base(x)
        bias = plain.new_zeros(()) if self.base.bias is None else self.base.bias.to(plain.dtype)
        row_scale = (self.magnitude / self.lengths()).to(plain.dtype)
        return row_scale * (plain - bias + self.update(x)) + bias

    def lengths(self) -> Tensor:
        """Norms of the rows of W + s B A, detached from the graph (section 4.3).  [out]

        |w + s b A|² = |w|² + 2 s b · (A w) + s² b (A A^T) b, so that the sum is never computed.
        """
        a, b = self.lora_A.detach(), self.lora_B.detach()
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            crossed = F.linear(a, self.base.weight).T  # [out, r]
            along = (b * (2 * self.scale * crossed + self.scale**2 * (b @ (a @ a.T)))).sum(1)
            return (self.squares + along).clamp(min=torch.finfo(torch.float32).tiny).sqrt()

    @property
    def weight(self) -> Tensor:
        """magnitude (W + s B A) / |W + s B A|.  [out, in]"""
        return (self.magnitude / self.lengths())[:, None] * super().weight


def add_lora(decoder: Decoder, config: SLMConfig, settings: LoRASettings, seed: int = 0) -> list[str]:
    """Freeze a decoder and add a trained update to the linears that `settings` name; returns their names.

    Raises `UserError` for a name that matches no linear.
    """
    expect_plain(decoder)
    decoder.requires_grad_(False)
    aliases = reference_names(decoder, config)
    saved = modules_to_save(decoder, config, settings)
    keep_base_in(decoder, settings.base_weights, saved)
    kind = DoRALinear if settings.use_dora else LoRALinear
    generator = torch.Generator().manual_seed(seed)

    def make(linear: LinearLike) -> nn.Module:
        adapted = kind(linear, settings.r, settings.scale, settings.lora_dropout)
        adapted.initialise(generator)
        return adapted

    names = swap(decoder, settings.target_modules, make, aliases, except_for=saved)
    modules_and_weights([aliases[name] for name in names], family_of(config.model_type), settings)
    for name in saved:
        decoder.get_submodule(name).requires_grad_(True)
    return names


def keep_base_in(decoder: Decoder, base_weights: str, except_for: Sequence[str] = ()) -> None:
    """Store the linears' matrices, except the head's and those named, as `base_weights`; `float32`: unchanged."""
    if base_weights != "float32":
        expect_full(decoder, f"lora.base_weights {base_weights}")
        swap(decoder, ALL_LINEAR, lambda linear: FrozenLinear(linear, base_weights), except_for=except_for)


def modules_to_save(decoder: Decoder, config: SLMConfig, settings: LoRASettings) -> list[str]:
    """The modules that are fully trained; a tied head is the embedding. Raises `UserError` for an unknown name."""
    aliases = reference_names(decoder, config)
    wanted = ["embedding" if decoder.head is None and one in ("head", "lm_head") else one
              for one in settings.modules_to_save]  # fmt: skip
    try:
        return matching(list(aliases), wanted, aliases)
    except UserError as error:
        raise UserError(f"modules_to_save: {error}") from None


def reference_names(decoder: Decoder, config: SLMConfig) -> dict[str, str]:
    """Every module with weights → its name in the reference implementation."""
    family = family_of(config.model_type)
    modules = (name.rpartition(".")[0] for name in decoder.state_dict())
    return {module: reference_name(module, family) for module in dict.fromkeys(modules)}


def adapted_linears(decoder: nn.Module) -> dict[str, LoRALinear]:
    """The adapted linears of a decoder, by name."""
    return {name: module for name, module in decoder.named_modules() if isinstance(module, LoRALinear)}


def expect_plain(decoder: nn.Module) -> None:
    """Raises `UserError` for a decoder that has an adapter already."""
    if adapted_linears(decoder):
        raise UserError("the model has an adapter already: fold() it first, or continue training it")


def fold(decoder: Decoder) -> Decoder:
    """Merge each update into its linear, in place; the decoder's outputs stay the same.

    Raises `UserError` for a quantized base: most of an update is smaller than its quantization steps, and would be lost
    by rounding.
    """
    for name, adapted in adapted_linears(decoder).items():
        if isinstance(adapted.base, FrozenLinear | Quantized):
            raise UserError(
                f"{name} is stored in {adapted.base.kind}, which is too coarse for what the adapter learned: "
                "merge the adapter into the full weights, with `slm merge`"
            )
        replace(decoder, name, _plain(adapted.weight.detach(), adapted.bias))
    return decoder.requires_grad_(True)


def _plain(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.size(1), weight.size(0), bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach())
    return linear


# -- frozen linears in fewer bits --------------------------------------------------------------------------------------


class FrozenLinear(nn.Module):
    """x W^T + b with a frozen matrix, stored as `codes` and `scales`, of the kind `name`."""

    def __init__(self, linear: LinearLike, name: str) -> None:
        super().__init__()
        self.kind, self.in_features, self.out_features = name, linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.codes: Tensor
        self.scales: Tensor
        encode, self.decode = FORMATS[name]
        codes, scales = encode(linear.weight.detach())
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> Tensor:
        """The dequantized matrix.  [out, in], float32"""
        values = self.decode(self.codes, self.scales).flatten()
        return values[: self.out_features * self.in_features].view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        return Product.apply(x, lambda x: F.linear(x, self.weight.to(x.dtype), self.bias), lambda: self.weight)


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """One byte per weight and a scale per row: the rounding error is at most 1/254 of the row's maximum."""
    scales = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127  # [out, 1]
    return (weight / scales).round().to(torch.int8), scales


def _to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Half a byte per weight and a scale per block of 64: 4.5 bits in total."""
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)  # [blocks]
    values = torch.tensor(NF4_VALUES, device=weight.device)
    borders = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(blocks / scales[:, None], borders).to(torch.uint8)  # [blocks, 64] of 0 … 15
    return codes[:, ::2] << 4 | codes[:, 1::2], scales  # [blocks, 32]: two in a byte


def _from_nf4(codes: Tensor, scales: Tensor) -> Tensor:
    values = torch.tensor(NF4_VALUES, device=codes.device)
    # Look up pairs of values, one of 256 for each byte: half as many look-ups.
    pairs = torch.stack((values.repeat_interleave(16), values.repeat(16)), dim=1)  # [256, 2]
    return pairs[codes.int()].flatten(1) * scales[:, None]  # [blocks, 64]


# Functions from a weight [out, in] to codes and scales, and from those to its values.
FORMATS: dict[str, tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Callable[[Tensor, Tensor], Tensor]]] = {
    "bfloat16": (lambda weight: (weight.bfloat16(), weight.new_empty(0)), lambda codes, scales: codes.float()),
    "int8": (_to_int8, torch.mul),
    "nf4": (_to_nf4, _from_nf4),
}
