"""Pictures and captions for training."""
