"""One random draw per clip, applied on the CPU or on the training device."""
