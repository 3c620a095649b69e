"""The report of a run: one HTML file that shows how it went, without a network and without scripts."""
