"""One training: the loop, the networks in it, their engine and their soft labels."""
