"""Images -> the batches of each training step: cut, mixed and normalised, from memory or from disk."""
