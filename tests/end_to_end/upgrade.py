"""A service on Ray that is upgraded when told: `python -m tests.end_to_end.upgrade BUNDLE PORT NUM_GATEWAYS`.

Prints a line once it serves; each line on standard input deploys it anew with a changed configuration, so that
every replica is replaced, and prints a line when that is done; the end of the input stops it all.
"""

import sys

from serving.app import APPLICATION, build, on_ray
from serving.config import ServingConfig


def main() -> None:
    """Run until standard input ends."""
    from ray import serve  # noqa: PLC0415 - after serving.app, which prepares Ray's environment

    bundle, port, num_gateways = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    gateway = {"port": port, "num_replicas": num_gateways, "share_port": num_gateways > 1}
    config = ServingConfig.parse({"bundle": bundle, "gateway": gateway})
    with on_ray(config):
        print("serving", flush=True)  # noqa: T201 - read by the test
        for number, _ in enumerate(sys.stdin, start=1):
            changed = config.merge({"batching": {"stall_after_s": 10.0 + number}})
            serve.run(build(changed), name=APPLICATION, route_prefix=None)
            print("upgraded", flush=True)  # noqa: T201 - as above


if __name__ == "__main__":
    main()
