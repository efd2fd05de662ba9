"""Labelled images: where they come from, and their three splits. Deployment reads none of this."""

NAMED = ("digits", "cifar10", "cifar100")
"""Data sets that are asked for by their names, not by a path."""
