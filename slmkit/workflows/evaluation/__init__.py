"""How good a model is: evaluating it, comparing it with others, and the report of a run."""
