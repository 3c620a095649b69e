"""Is a file an image? Each one is decoded once, in a child process that may die of it, and the answer is kept."""
