"""Training, for any modality."""
