"""A training run gone through again, step by step, and backwards: what each sample's weight did to its end."""
