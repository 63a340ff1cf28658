#!/bin/bash
# Runs a ttsnap command on all machines of a Slurm job. Submitted again, the same command goes on with what is missing:
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 --time=12:00:00 examples/slurm.sh \
#     record --prompts prompts.txt --per-prompt 20 --model DIR --out /shared/tree --workers 32
#SBATCH --job-name=ttsnap
#SBATCH --ntasks-per-node=1 --exclusive
#SBATCH --output=ttsnap-%j.log
set -euo pipefail
export RAY_USAGE_STATS_ENABLED=0
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(python3 -c "import secrets; print(secrets.token_hex(32))")}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer takes this from sbatch
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
ip=$(python3 -c "import ray; print(ray.util.get_node_ip_address())") # this script runs on the first machine
export address="$ip:$((20000 + SLURM_JOB_ID % 10000))"

# Ray on every machine: the first leads, the others join when it answers.
srun --overlap --label bash -c '
  if [ "$SLURM_NODEID" = 0 ]; then
    exec ray start --head --port="${address#*:}" --num-cpus="$SRUN_CPUS_PER_TASK" --include-dashboard=false --block
  fi
  until ray start --address="$address" --num-cpus="$SRUN_CPUS_PER_TASK" --block; do sleep 5; done' &> "ttsnap-$SLURM_JOB_ID.ray.log" &
until srun --overlap --nodes=1 --ntasks=1 -w "$head" ray status --address="$address" &> /dev/null; do sleep 2; done

srun --overlap --nodes=1 --ntasks=1 -w "$head" ttsnap "$@" --ray-address="$address"
