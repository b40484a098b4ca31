"""Objectives beside next-token prediction: distillation, DPO, KTO, GRPO."""
