"""The results page: stored measurements -> docs/results.md."""
