#!/bin/bash
#SBATCH --job-name=train
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
# Trains on several nodes, in several jobs if one time limit is too short. Submit it from the folder
# above:
#
#   sbatch launch/train_slurm.sh --config configs/clog_loss_ddp.yaml store=STORE out=OUT
#
# Ten minutes before the time limit (--signal) all nodes save a checkpoint and end, and the job is
# requeued. Slurm also requeues it when a node fails (--requeue). A job that is cancelled, or ends
# with an error, is not restarted.
set -euo pipefail
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export PET_NNODES="$SLURM_NNODES"
export PET_NPROC_PER_NODE="${SLURM_GPUS_ON_NODE:-1}"
# Jobs that share a node must not use the same port.
export PET_RDZV_ENDPOINT="$host:$((20000 + SLURM_JOB_ID % 10000))"
export PET_RDZV_ID="$SLURM_JOB_ID"
# Less than the time that --signal leaves.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540

told=
# Once only. Without --batch, scancel's signal reaches the tasks of srun, not this script.
trap 'trap "" USR1; told=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# Slurm's own names of the nodes are used throughout, as theirs may not be known to each other. The
# first is where all meet, and waits for the last to be booted.
# shellcheck disable=SC2016  # each task expands it for itself
each='[[ $SLURM_NODEID == 0 ]] && first=true || first=false
  export PET_LOCAL_ADDR="$SLURMD_NODENAME"
  export PET_RDZV_CONF="is_host=$first,join_timeout=1800,read_timeout=600"
  exec launch/torchrun.sh "$@"'
# A task that ends first must not end one that still writes the checkpoint.
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c "$each" train "$@" &
tasks=$!
code=0
wait "$tasks" || code=$?
if [[ -n $told ]]; then
  # The signal ended the first 'wait', not the tasks.
  code=0
  wait "$tasks" || code=$?
fi
if [[ -n $told && $code -ne 0 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
