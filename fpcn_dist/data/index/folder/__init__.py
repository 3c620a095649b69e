"""What a folder of images holds: which folders are classes and splits, and what is left out."""
