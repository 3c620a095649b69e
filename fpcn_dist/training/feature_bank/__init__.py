"""The features of a frozen backbone, computed once."""
