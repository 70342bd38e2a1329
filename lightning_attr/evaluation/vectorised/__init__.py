"""Many models retrained at once, like one that the Trainer itself has trained."""
