# shellcheck shell=bash
# What is particular about your cluster. Copy this file to launch/slurm/site.sh (git ignores it) and edit it; then
#   source launch/slurm/site.sh && sbatch ... launch/slurm/train.sbatch CONFIG
# You source it for the SBATCH_ variables, which sbatch reads; the jobs source it themselves for the rest.

# export SBATCH_PARTITION=PARTITION SBATCH_ACCOUNT=ACCOUNT SBATCH_TIMELIMIT=24:00:00
# export SBATCH_MEM_PER_CPU=4G

# The environment with oat_dist in it, the same on all nodes.
# module load python cuda
source .venv/bin/activate

# The network that the ranks talk over (`ip -br address` on a node): without these, gloo takes the interface that the
# node's own name stands for, which on Debian is the loopback, and NCCL one of its choice.
# export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0

# A disk of the node's own: caches go there, and the packed set $DATA is copied there before training.
# export OAT_SCRATCH=/scratch/$USER/oat_dist OAT_DIST_CACHE=/scratch/$USER/oat_dist
# export DATA=/shared/packed/imagenet

# On nodes without GPUs nothing is needed; on a node with GPUs this keeps the ranks on its CPU.
# export ACCELERATE_USE_CPU=true

# How many attempts in a row may fail without getting further (3), where jobs keep their notes (slurm-jobs), and
# whether srun starts the ranks itself (srun) or an `accelerate launch` on every node (accelerate).
# export MAX_FAILURES=3 OAT_JOBS=slurm-jobs LAUNCHER=srun
