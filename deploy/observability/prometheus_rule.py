"""The rules as the operator of Prometheus wants them on Kubernetes."""

import textwrap
from typing import Final

_HEAD: Final = """\
# Made from rules.yaml by `python -m deploy.observability`.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: vae
  labels: {app.kubernetes.io/instance: vae}
spec:
"""


def wrapped(rules: str) -> str:
    """Return a plain rule file as a PrometheusRule; its comments stay."""
    body = rules[rules.index("groups:") :]
    return _HEAD + textwrap.indent(body, "  ")
