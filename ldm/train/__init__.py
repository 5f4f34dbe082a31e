"""Floor 5: a training run: its options, data, callbacks and files."""
