"""Programs written by models: sandbox, HumanEval, MBPP."""
