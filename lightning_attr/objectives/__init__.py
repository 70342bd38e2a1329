"""What of a module is attributed: a model output that its mixin names, or the loss of its training step."""
