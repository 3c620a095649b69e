"""The paper's tables and figures on the user's data: a grid of runs, and one report of what came out."""
