"""Quantised weights as values: NF4, FP4 and int8 in pure JAX. Knows no Flax and no models."""
