"""The classes that a script wants: `SLMForCausalLM`, `SLMEnsemble`, `SLMTrainer`."""
