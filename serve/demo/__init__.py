"""The Gradio demo. Only `page` and what it imports load Gradio; the guard runs in front of it without."""
