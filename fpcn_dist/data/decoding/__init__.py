"""From the bytes of a file to upright pixels, by one of two backends: NVIDIA DALI, or torchvision and Pillow."""
