"""A bundle answers: batch prediction, the HTTP server and its demo, and a cluster.
Nothing here imports torch."""
