"""The classes for scripts: `SLMForCausalLM`, `SLMEnsemble`, `SLMTrainer`."""
