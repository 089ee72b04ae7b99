#!/bin/bash
# Trains under torchrun, which restarts the workers from the newest checkpoint when one dies. Run it
# from the folder above, once on each machine:
#
#   launch/torchrun.sh --config configs/clog_loss_ddp.yaml store=STORE out=OUT
#   PET_NNODES=1:4 PET_RDZV_ENDPOINT=HOST:29400 PET_RDZV_ID=mine launch/torchrun.sh --config ...
#
# The first command is for one machine. The second is for 1 to 4 machines, of which HOST is one:
# when a machine is lost, training continues on the others. OUT and STORE must be on a disk that all
# machines share, and plan.batch a multiple of every possible number of processes. torchrun reads
# each of its options from an environment variable PET_NAME, too.
set -euo pipefail
export PET_NNODES="${PET_NNODES:-1}"
export PET_NPROC_PER_NODE="${PET_NPROC_PER_NODE:-gpu}"
export PET_MAX_RESTARTS="${PET_MAX_RESTARTS:-10}"
export PET_RDZV_BACKEND="${PET_RDZV_BACKEND:-c10d}"
# A single machine takes any free port.
export PET_RDZV_ENDPOINT="${PET_RDZV_ENDPOINT:-localhost:0}"
# Seconds from SIGTERM to SIGKILL, in which a checkpoint is saved.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
exec python launch/elastic.py -m dist_train train --resume auto "$@"
