"""Calls of the user's code beside training: each in its own world, and all state put back after it."""
