"""Which images a run uses: what a folder holds, whether each file is an image, and the manifest of both."""
