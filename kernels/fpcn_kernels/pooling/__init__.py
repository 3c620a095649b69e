"""Masked pooling (eq. 1 to 5 and 7): the operator and what computes it."""
