"""Labelled images: where they come from, and their three splits. Deployment reads none of this."""
