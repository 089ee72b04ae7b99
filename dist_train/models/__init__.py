"""Clips and their lengths in, logits out. Knows no data and no process group."""
