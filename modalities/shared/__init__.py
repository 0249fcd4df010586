"""What several modalities use: the text encoder, the archive cache and the training loop."""
