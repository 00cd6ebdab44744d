"""A Ray cluster of labelled nodes, one for each role: `python -m tests.end_to_end.labelled_cluster ROLE...`.

Prints its address. Then answers lines on standard input, each with one line of JSON:

- `where`: the roles of the nodes on which replicas run, by deployment.
- `lose ROLE`: kills the first node of a role, as a machine is lost.
- `add ROLE`: adds one.
- `deploy FILE`: gives Serve another configuration.
- `status`: Serve's view of the application, and its message.

The end of the input stops it all.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.cluster_utils import Cluster
from ray.serve.schema import ServeDeploySchema

from serving.app import APPLICATION
from serving.config import ROLE_LABEL

STORE_BYTES = 80 * 2**20


def main() -> None:
    """Run until standard input ends."""
    options: dict[str, Any] = {"object_store_memory": STORE_BYTES, "include_dashboard": False}
    # As on Kubernetes, where num-cpus of the head is 0: nothing of ours is placed there.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **options})
    nodes: list[tuple[str, Any]] = [(role, _add(cluster, role)) for role in sys.argv[1:]]
    try:
        ray.init(cluster.address, namespace="serve", logging_level=logging.ERROR, log_to_driver=False)
        _say(cluster.address)
        for line in sys.stdin:
            verb, _, argument = line.strip().partition(" ")
            if verb == "lose":
                lost = next(entry for entry in nodes if entry[0] == argument)
                nodes.remove(lost)
                cluster.remove_node(lost[1], allow_graceful=False)
            elif verb == "add":
                nodes.append((argument, _add(cluster, argument)))
            elif verb == "deploy":
                schema = ServeDeploySchema.model_validate(yaml.safe_load(Path(argument).read_text()))
                _client().deploy_apps(schema)
            _say({"where": _where, "status": _status}.get(verb, lambda: "done")())
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]


def _add(cluster: Cluster, role: str) -> Any:  # noqa: ANN401 - Ray's own type
    return cluster.add_node(num_cpus=1, labels={ROLE_LABEL: role}, object_store_memory=STORE_BYTES)


def _client() -> Any:  # noqa: ANN401 - as above
    from ray.serve.context import _get_global_client  # noqa: PLC0415 - there is no public view of where replicas are

    return _get_global_client()


def _application() -> dict[str, Any]:
    found: dict[str, Any] = _client().get_serve_details()["applications"]
    application: dict[str, Any] = found.get(APPLICATION, {"deployments": {}})
    return application


def _where() -> dict[str, list[str]]:
    roles = {node["NodeID"]: node["Labels"].get(ROLE_LABEL, "head") for node in ray.nodes()}  # type: ignore[no-untyped-call]
    return {
        name: sorted(roles[each["node_id"]] for each in details["replicas"] if each["state"] == "RUNNING")
        for name, details in _application()["deployments"].items()
    }


def _status() -> list[str]:
    application = _application()
    return [application["status"], application["message"]]


def _say(fact: object) -> None:
    print(json.dumps(fact), flush=True)  # noqa: T201 - read by the test


if __name__ == "__main__":
    main()
