#!/bin/bash
#SBATCH --job-name=dpo_finetune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --requeue
# sbatch job.sh [SCRIPT]
export SCRIPT=${1:-run.py} PORT=${PORT:-29500} HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun bash -c 'accelerate launch --multi_gpu --num_machines $SLURM_NNODES \
  --num_processes $((SLURM_NNODES * SLURM_GPUS_PER_NODE)) --machine_rank $SLURM_PROCID \
  --main_process_ip $HEAD --main_process_port $PORT $SCRIPT'
