"""The classification loss over pairs of images (eq. 6, 8, 9): the operator and what computes it."""
