"""``accelerate launch`` with the exit codes of ``elastic.py``, and without a traceback of its own
after a worker's message.

    python launch/start.py --config_file launch/gpu_1node.yaml --num_processes 8 \\
        -m dist_train train ...
"""

from __future__ import annotations

import subprocess
import sys

from elastic import run


def launch() -> None:
    """Start the workers, and wait for them."""
    from accelerate.commands.launch import main

    try:
        main()
    except subprocess.CalledProcessError as failed:
        # One process alone is started without torchrun.
        sys.exit(failed.returncode if failed.returncode > 0 else 128 - failed.returncode)
    except (ValueError, ConnectionError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    sys.exit(run(launch))
