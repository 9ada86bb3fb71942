"""What a model and a claim are worth, measured."""
