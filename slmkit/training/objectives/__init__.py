"""Objectives other than next-token prediction: distillation, DPO, KTO, GRPO."""
