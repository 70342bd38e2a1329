"""Samples: where they come from, how they are read in data set order, how much memory they may use."""
