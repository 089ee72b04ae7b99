"""``python -m dist_train``, and ``accelerate launch -m dist_train``."""

from dist_train.cli import main

main()
