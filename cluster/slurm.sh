#!/usr/bin/env bash
# A Ray cluster for one command of dray on Slurm: a head and its workers in one allocation, which ends with the command.
#
#   sbatch --nodes 4 cluster/slurm.sh train spec.yaml --storage /shared/runs
#
# Submitted again, or requeued, the same command goes on with the run. Fields to change: the #SBATCH lines, and DRAY_BIN, where dray's virtual
# environment lies on every node.
#SBATCH --job-name=dray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
# Two minutes before its time is over, the command is told to save its state.
set -euo pipefail

DRAY_BIN=${DRAY_BIN:-$HOME/dray/.venv/bin}
PORT=${RAY_PORT:-6379}
export PATH="$DRAY_BIN:$PATH"

# The token of this cluster alone; whoever has it runs code here.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN_PATH=$(mktemp "$HOME/.dray-token-XXXXXX")
export RAY_AUTH_TOKEN_PATH
chmod 600 "$RAY_AUTH_TOKEN_PATH"
od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
head_ip=$(srun --nodes=1 --ntasks=1 -w "$head" --overlap hostname --ip-address | awk '{print $1}')
cpus=${SLURM_CPUS_ON_NODE:-$(nproc)}
gpus=${SLURM_GPUS_ON_NODE:-0}

# shellcheck disable=SC2317  # the trap calls it
end() {
  kill "${steps[@]}" 2> /dev/null || true
  wait "${steps[@]}" 2> /dev/null || true
  rm -f "$RAY_AUTH_TOKEN_PATH"
}
steps=()
trap end EXIT

srun --nodes=1 --ntasks=1 -w "$head" --overlap ray start --head --node-ip-address="$head_ip" --port="$PORT" \
  --dashboard-host=127.0.0.1 --num-cpus="$cpus" --num-gpus="$gpus" --disable-usage-stats --block &
steps+=($!)
for node in "${nodes[@]:1}"; do
  srun --nodes=1 --ntasks=1 -w "$node" --overlap ray start --address="$head_ip:$PORT" \
    --num-cpus="$cpus" --num-gpus="$gpus" --disable-usage-stats --block &
  steps+=($!)
done

count_nodes() {
  RAY_ADDRESS="$head_ip:$PORT" python - 2> /dev/null << 'END' || echo 0
import ray

ray.init(logging_level="ERROR", log_to_driver=False)
print(sum(node["Alive"] for node in ray.nodes()))
END
}

deadline=$((SECONDS + 300))
until [ "$(count_nodes | tail -1)" -ge "${#nodes[@]}" ]; do
  if [ "$SECONDS" -gt "$deadline" ]; then
    echo "dray: not all of ${#nodes[@]} nodes have joined the cluster within 300 s" >&2
    exit 1
  fi
  for step in "${steps[@]}"; do
    if ! kill -0 "$step" 2> /dev/null; then
      echo "dray: Ray did not start on one of the nodes: see above" >&2
      exit 1
    fi
  done
  sleep 2
done

# In the background, so that the signal reaches the shell, which hands it on: dray saves its state and ends.
RAY_ADDRESS="$head_ip:$PORT" dray "$@" &
command=$!
trap 'kill -TERM "$command" 2> /dev/null || true' TERM INT
code=0
wait "$command" || code=$?
while kill -0 "$command" 2> /dev/null; do
  code=0
  wait "$command" || code=$?
done
exit "$code"
