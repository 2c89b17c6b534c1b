"""Weights of 4 bits: how they are stored, and how they are multiplied."""
