"""dist_train: from raw, labelled, imbalanced 3D clips to a trained, calibrated 3D CNN."""

__version__ = "0.1.0"
