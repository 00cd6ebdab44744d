"""A Ray cluster that grows when told: `python -m tests.end_to_end.cluster FIRST_CPUS SECOND_CPUS`.

Prints its address; a line on standard input adds the second node; the end of the input stops it all.
"""

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    """Run until standard input ends."""
    first, second = (int(argument) for argument in sys.argv[1:])
    options = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": first, **options})
    try:
        print(cluster.address, flush=True)  # noqa: T201 - read by the test
        for _ in sys.stdin:
            cluster.add_node(num_cpus=second, object_store_memory=80 * 2**20)
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
