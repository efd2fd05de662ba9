"""Images -> run directory: networks that learn from each other, their data, and the comparison of methods."""
