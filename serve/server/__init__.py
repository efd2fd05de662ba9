"""Verified bundles behind the Open Inference Protocol, and what protects, limits and watches a server."""
