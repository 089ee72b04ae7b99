#!/bin/bash
#SBATCH --job-name=prepare
#SBATCH --array=1-64
#SBATCH --cpus-per-task=8
#SBATCH --mem=8G
#SBATCH --requeue
# A store, written by a SLURM array; a task that is killed and requeued goes on where it was:
#
#   id=$(sbatch --parsable launch/prepare_slurm.sh --manifest M --source S --out STORE)
#   sbatch --dependency=afterok:$id --wrap 'dist-train finalize STORE'
#
# More tasks, or fewer: sbatch --array=1-N. The array must begin with 1 and have no gaps.
set -euo pipefail
exec dist-train prepare "$@" --part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" \
  --workers "${SLURM_CPUS_PER_TASK:-1}"
