#!/bin/bash
# A recipe: submits each stage to start when the one before has finished (not when it has stopped or was requeued).
#   launch/slurm/chain.sh CONFIG [CONFIG ...] [-- OPTIONS OF swinv2-scale submit]
#   launch/slurm/chain.sh configs/a.yaml configs/b.yaml -- --nodes 8 --gpus-per-node 8
# A stage's init_from names the run directory of the one before. All stages are checked before the first is submitted.
# If a stage fails for good, Slurm removes those that wait for it.
set -euo pipefail

stages=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    stages+=("$1")
    shift
done
if [ "${1:-}" = -- ]; then shift; fi
if [ "${#stages[@]}" -eq 0 ]; then
    echo "usage: $0 CONFIG [CONFIG ...] [-- OPTIONS OF swinv2-scale submit]" >&2
    exit 78
fi

submit=("${PYTHON:-python}" -m swinv2_scale submit)
for stage in "${stages[@]}"; do
    "${submit[@]}" "$stage" "$@" --print >/dev/null
done

after=()
for stage in "${stages[@]}"; do
    job=$("${submit[@]}" "$stage" "$@" "${after[@]}" --parsable)
    echo "$stage: job $job${after[1]:+, after job ${after[1]}}"
    after=(--after "$job")
done
