#!/bin/bash
# Trains under torchrun, which starts the workers anew when one dies, each time from the newest
# checkpoint. Run it from the folder above, once on each machine:
#
#   launch/torchrun.sh --config configs/clog_loss_ddp.yaml store=STORE out=OUT
#   PET_NNODES=1:4 PET_RDZV_ENDPOINT=HOST:29400 PET_RDZV_ID=mine launch/torchrun.sh --config ...
#
# The first is for one machine. With the second, HOST being one of the machines, training begins
# when as many as can be have come, and goes on with those that are left when one is lost. Give OUT
# and STORE on a disk that all machines share. plan.batch must be a multiple of each number of
# processes that may be left. torchrun reads any of its options as PET_NAME.
set -euo pipefail
export PET_NNODES="${PET_NNODES:-1}"
export PET_NPROC_PER_NODE="${PET_NPROC_PER_NODE:-gpu}"
export PET_MAX_RESTARTS="${PET_MAX_RESTARTS:-10}"
export PET_RDZV_BACKEND="${PET_RDZV_BACKEND:-c10d}"
# One machine alone takes any free port.
export PET_RDZV_ENDPOINT="${PET_RDZV_ENDPOINT:-localhost:0}"
# Seconds from SIGTERM to SIGKILL, in which a checkpoint is saved.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
exec python launch/elastic.py -m dist_train train --resume auto "$@"
