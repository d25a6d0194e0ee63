#!/usr/bin/env bash
# Pretrain on several nodes of a Slurm cluster. From the checkout, with its .venv in place, and with
# URLs that all nodes see:
#   sbatch examples/slurm.sh --data s3://bucket/in100 --cache /local/disk --out /shared/runs/hp --recipe hp
# Before the time limit, or when the job is preempted, the state is saved and the job is queued again;
# it resumes at the same step.
#SBATCH --job-name=pretrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=1 # each rank shares out the cores itself

stopped=no
srun --kill-on-bad-exit=1 \
    .venv/bin/torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:29400" \
    --no-python .venv/bin/saliency-train "$@" &
step=$!
# to torchrun on each node, which hands it on to its ranks; srun itself would end them by force
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM

status=0
wait "$step" || status=$?
if [[ $stopped == yes ]]; then
    wait "$step" || true # the trap interrupted the first wait
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
