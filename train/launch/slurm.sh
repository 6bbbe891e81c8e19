#!/usr/bin/env bash
# One run on several nodes of a SLURM cluster with a shared file system:
#     sbatch --nodes 2 train/launch/slurm.sh --depth 24 --data data/climbmix --out runs/d24
# Five minutes before the time limit the run saves and stops; submit it again to resume. After a preemption
# SLURM requeues the job by itself.
#SBATCH --job-name=hotlap
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun .venv/bin/torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node gpu \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
    --max-restarts 3 \
    -m hotlap.cli pretrain --resume auto "$@"
