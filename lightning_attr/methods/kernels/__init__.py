"""Damped kernels of a training set: over features, and over samples."""
