#!/bin/bash
# sbatch slurm.sh RECIPE [KEY=VALUE …]: one launcher a host, one process a GPU. The folder must be on a shared file system.
#SBATCH --job-name=slm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=slm-%j.log

set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)

# The number of the job stays when it is requeued, and with it the run that it goes on with.
exec srun torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$head:29400" --rdzv-id "$SLURM_JOB_ID" \
  -m slmkit.cli train "$@"
