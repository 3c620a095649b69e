"""A Ray cluster of several nodes on this machine, in a process of its own that obeys lines on its standard input.

python tests/helpers/ray_nodes.py 3     # prints the address; then: "kill NODE_ID", "add"
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile

os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="fpcn-", dir="/tmp")
os.mkdir(os.path.join(os.environ["RAY_TMPDIR"], "ray"))

from ray.cluster_utils import Cluster  # noqa: E402 (reads the variable)


def main() -> None:
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    head = {**node, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "num_cpus": 0})
    for _ in range(int(sys.argv[1])):
        cluster.add_node(**node)
    print(cluster.address, flush=True)
    for line in sys.stdin:
        command, _, node_id = line.strip().partition(" ")
        if command == "kill":
            (victim,) = [n for n in cluster.list_all_nodes() if n.node_id == node_id]
            cluster.remove_node(victim, allow_graceful=False)
        else:
            cluster.add_node(**node)
        print("done", flush=True)
    cluster.shutdown()
    shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)


if __name__ == "__main__":
    main()
