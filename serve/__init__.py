"""What runs a bundle: batch prediction, the HTTP server, the demo. Never imports torch."""
