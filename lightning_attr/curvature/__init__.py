"""Numerics of curvature: products, solvers, and Kronecker factors; vectors are rows."""
