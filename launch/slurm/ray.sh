# Sourced by the batch scripts that need Ray: a cluster over the nodes of the job, for this job alone.

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | sha256sum | cut -c 1-64)
export RAY_USAGE_STATS_ENABLED=0
ip=${FPCN_HEAD_IP:-$(getent ahostsv4 "$head" | awk '{ print $1; exit }')}
address=$ip:$port

# Its sockets may have names of at most 107 bytes; hardly anything passes through its object store.
ray_node() {
    srun --overlap "$@" "${FPCN_LAUNCH[@]}" ray start "${ray_options[@]}" --num-cpus="${SLURM_CPUS_ON_NODE:-1}" \
        --num-gpus="$gpus" --object-store-memory=$((256 << 20)) --block &
}
mkdir -p "$output/logs"
log "Ray on $SLURM_NNODES node(s), head $address, into $output"
ray_options=(--head --node-ip-address="$ip" --port="$port" --temp-dir="/tmp/fpcn-$SLURM_JOB_ID" --include-dashboard=false)
ray_node --nodes=1 --ntasks=1 --nodelist="$head" > "$output/logs/ray-head.log" 2>&1
if [ "$SLURM_NNODES" -gt 1 ]; then
    others=$((SLURM_NNODES - 1))
    ray_options=(--address="$address")
    # They try again until the head answers.
    ray_node --nodes=$others --ntasks=$others --ntasks-per-node=1 --exclude="$head" > "$output/logs/ray-workers.log" 2>&1
fi
"${FPCN_LAUNCH[@]}" python -m fpcn_dist.studies.cluster "$address" "$SLURM_NNODES" || exit
