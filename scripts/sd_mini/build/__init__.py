"""Assembling the captioned pictures that SD-mini learns from; only `scripts/` imports this room."""
