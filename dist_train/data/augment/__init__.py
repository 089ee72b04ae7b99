"""One random draw a clip, and its application on the CPU or on the training device."""
