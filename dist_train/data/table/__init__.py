"""The clip table: files, labels, groups, splits and weights, as users write it."""
