"""The report of a run is one HTML file that shows how it went, without a network and without scripts."""
