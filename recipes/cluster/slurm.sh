#!/usr/bin/env bash
# Trains one recipe on several machines of a Slurm cluster: one task per machine starts accelerate,
# which starts one process for each of its GPUs.
#
#   sbatch --nodes=2 --gpus-per-node=8 recipes/cluster/slurm.sh recipes/llama-70b-80gb.yaml
#
# The recipe, its data, the run folder and QTUNE_CACHE have to lie on a file system that all machines
# share. A job that is requeued or started again goes on from its last checkpoint.
#SBATCH --job-name=qtune
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=qtune-%j.log
# ten minutes before the time is over, so that a checkpoint is written
#SBATCH --signal=TERM@600
set -euo pipefail

recipe=${1:?usage: sbatch slurm.sh RECIPE [KEY=VALUE ...]}
export QTUNE_CACHE=${QTUNE_CACHE:-$HOME/.cache/qtune}

gpus=${SLURM_GPUS_ON_NODE:-8}
address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
# two jobs on one machine do not meet
port=$((20000 + SLURM_JOB_ID % 20000))
# seconds that torchrun gives processes to write a checkpoint, instead of 30
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-570}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_PER_TASK / gpus))}

folder=$(python - "$@" <<'PYTHON'
import sys
from pathlib import Path
from qtune.recipe_yaml import load
print(load(Path(sys.argv[1]), sys.argv[2:]).run)
PYTHON
)
# a run that has begun is resumed
resume=()
if [[ -f $folder/recipe.yaml ]]; then resume=(--resume); fi

# SLURM_NODEID is known on each machine, so it is read there
srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --multi_gpu --mixed_precision no --dynamo_backend no \
        --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
        --num_processes "$1" --main_process_ip "$2" --main_process_port "$3" \
        -m qtune train "${@:4}"
' qtune $((SLURM_NNODES * gpus)) "$address" "$port" "$@" "${resume[@]}"
