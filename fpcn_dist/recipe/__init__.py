"""Recipes: their schema, reading and writing them, and the command lines that override them."""
