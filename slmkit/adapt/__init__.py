"""What changes a built model: LoRA, merging, quantization."""

from slmkit.adapt.adapter import load_adapter, save_adapter
from slmkit.adapt.fold import fold
from slmkit.adapt.load import load_adapted, load_model
from slmkit.adapt.lora import add_lora
from slmkit.adapt.swap import swap
from slmkit.model.lora_settings import LoRASettings

__all__ = ["LoRASettings", "add_lora", "fold", "load_adapted", "load_adapter", "load_model", "save_adapter", "swap"]
