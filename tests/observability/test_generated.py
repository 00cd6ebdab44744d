"""What is made is fresh: the table of metrics, the PrometheusRule, the component for Kubernetes."""

import re
import struct
from typing import Any

import pytest
import yaml

from deploy.observability import grafana, prometheus_rule, reference
from tests.observability.prometheus import OBSERVABILITY

README = (OBSERVABILITY / "README.md").read_text()
MAX_PICTURES_BYTES = 400_000


def test_the_table_of_metrics_is_fresh() -> None:
    """Every metric that is declared stands in the README: after a change run `python -m deploy.observability`."""
    assert reference.replaced_in(README) == README
    assert len(list(reference.entries())) > 30


def test_a_text_without_marks_is_refused() -> None:
    """The table is not lost silently."""
    with pytest.raises(ValueError, match="marks"):
        reference.replaced_in("no table here")


def test_the_prometheus_rule_has_the_rules() -> None:
    """The same groups, in the wrapping of the operator."""
    rules = (OBSERVABILITY / "rules.yaml").read_text()
    checked_in = (OBSERVABILITY / "prometheusrule.yaml").read_text()
    assert prometheus_rule.wrapped(rules) == checked_in, "run `python -m deploy.observability`"
    wrapped: dict[str, Any] = yaml.safe_load(checked_in)
    assert wrapped["spec"] == yaml.safe_load(rules)


def test_the_component_has_every_dashboard() -> None:
    """On Kubernetes Grafana gets all of them, and each file that is named is there."""
    component: dict[str, Any] = yaml.safe_load((OBSERVABILITY / "kustomization.yaml").read_text())
    (dashboards,) = component["configMapGenerator"]
    assert dashboards["files"] == sorted(f"dashboards/{name}" for name in grafana.files())
    for name in [*dashboards["files"], *component["resources"]]:
        assert (OBSERVABILITY / name).exists()


def test_the_pictures_are_small_and_shown() -> None:
    """Each picture stands in the README; together they are less than 400 KB."""
    pictures = sorted((OBSERVABILITY / "pictures").iterdir())
    assert sorted(re.findall(r"\]\(pictures/([\w.-]+)\)", README)) == [path.name for path in pictures]
    assert sum(path.stat().st_size for path in pictures) < MAX_PICTURES_BYTES
    for path in pictures:
        head = path.read_bytes()[:24]
        assert head.startswith(b"\x89PNG")
        width, _height = struct.unpack(">II", head[16:24])
        assert width >= 1000
