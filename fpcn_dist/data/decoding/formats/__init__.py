"""The headers of image files, by format: size, mode and orientation, by parsers of our own. Imports no torch."""
