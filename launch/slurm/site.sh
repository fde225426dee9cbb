# shellcheck shell=bash disable=SC1091,SC2034,SC2154
# What differs from site to site. Copy it, or edit it here; `swinv2-scale submit --site FILE` takes another one.

# 1. When a job is submitted: sbatch reads these by itself, before the #SBATCH lines (man sbatch, INPUT ENVIRONMENT
#    VARIABLES). `swinv2-scale submit` and `recipe submit` source it; by hand: source launch/slurm/site.sh; sbatch ...
# export SBATCH_ACCOUNT=my_project
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal
# export SBATCH_CONSTRAINT=a100

# 2. In the job, on its first node, before the tasks start; they inherit the environment. Failing here ends the job.
prepare() {
    # module purge && module load cuda/12.8 || return
    # export NCCL_SOCKET_IFNAME=ib0      # the interface that NCCL and gloo meet on, if they choose another one
    # export GLOO_SOCKET_IFNAME=ib0
    # export NCCL_IB_TIMEOUT=22          # for large InfiniBand fabrics that lose a packet now and then
    # The environment that `make setup` makes, where there is one:
    if [ -f "$repository/.venv/bin/activate" ]; then source "$repository/.venv/bin/activate"; fi
}

# 3. More options of srun. With Pyxis, say: a container, and what it sees of the site (docs/containers.md).
srun_options=()
# srun_options=(--container-image=/shared/swinv2.sqsh --container-mounts=/shared:/shared,"$PWD:$PWD" --container-workdir="$PWD")
