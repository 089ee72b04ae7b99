"""Synthetic videos in the form of the Clog Loss challenge: the embedded default data."""
