"""The rules are valid, each alert is proved to fire and to be silent, and each has its entry in the runbook."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.config import ServingConfig
from tests.observability.prometheus import OBSERVABILITY, program

RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((OBSERVABILITY / "rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
TESTS: list[dict[str, Any]] = yaml.safe_load((OBSERVABILITY / "rules_test.yaml").read_text())["tests"]
RUNBOOK = (OBSERVABILITY / "runbook.md").read_text()
FIELDS = ("Means", "Users see", "Look", "Do")


def promtool(*arguments: str) -> str:
    """Run promtool; return what it printed, once it is content."""
    done = subprocess.run(
        [program("promtool"), *arguments],
        cwd=OBSERVABILITY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def fired() -> list[dict[str, str]]:
    """Return the labels of every alert that a test of the rules expects to fire."""
    samples = [
        sample["labels"]
        for test in TESTS
        for question in test.get("promql_expr_test", ())
        for sample in question["exp_samples"]
    ]
    return [dict(re.findall(r'(\w+)="([^"]*)"', labels)) for labels in samples]


def headings() -> list[str]:
    """Return the anchors of the runbook, as GitHub makes them."""
    return [heading.strip().lower() for heading in re.findall(r"^## (.+)$", RUNBOOK, re.MULTILINE)]


def test_promtool_accepts_the_rules_and_the_configuration() -> None:
    """Both parse, and the configuration finds the rules."""
    assert f"{len(RULES)} rules found" in promtool("check", "rules", "rules.yaml")
    assert "1 rule files found" in promtool("check", "config", "prometheus.yaml")


@pytest.mark.slow
def test_every_test_of_the_rules_passes() -> None:
    """Prometheus's own evaluation over made-up series gives the alerts that are listed, and no other."""
    promtool("test", "rules", "rules_test.yaml")


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_fires_in_a_test_and_is_silent_in_another(alert: str) -> None:
    """Every list is of all that fires, so a list without the alert proves that it is silent."""
    questions = [
        [sample["labels"] for sample in question["exp_samples"]]
        for test in TESTS
        for question in test.get("promql_expr_test", ())
        if question["expr"].endswith('(ALERTS{alertstate="firing"})')
    ]
    has_fired = [any(f'alertname="{alert}"' in labels for labels in samples) for samples in questions]
    assert any(has_fired), f"no test of rules_test.yaml lets {alert} fire"
    assert not all(has_fired), f"no test of rules_test.yaml keeps {alert} silent"


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_says_what_where_and_what_to_do(alert: str) -> None:
    """A severity that somebody acts on, labels that the alert has, and an entry of the runbook."""
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in {"page", "ticket"}
    notes = rule["annotations"]
    file, _, anchor = notes["runbook_url"].partition("#")
    assert Path(file) == OBSERVABILITY.relative_to(OBSERVABILITY.parents[1]) / "runbook.md"
    assert anchor in headings()
    named = set(re.findall(r"\$labels\.(\w+)", notes["summary"] + notes["description"]))
    has = {label for labels in fired() if labels.get("alertname") == alert for label in labels}
    assert named <= has, f"{alert} names labels that it does not have: {named - has}"


def test_the_runbook_has_no_entry_without_an_alert() -> None:
    """An entry goes when its alert goes; each says what it means, what users see, where to look, what to do."""
    assert sorted(headings()) == sorted(name.lower() for name in ALERTS)
    for entry in RUNBOOK.split("\n## ")[1:]:
        said = entry.replace("**Look** and **do**", "**Look** **Do**")
        assert [field for field in FIELDS if f"**{field}**" not in said] == [], entry.splitlines()[0]


def test_the_runbook_names_settings_that_exist() -> None:
    """`gateway.max_replicas` in the runbook or in an alert is a key of the configuration."""
    text = RUNBOOK + (OBSERVABILITY / "rules.yaml").read_text()
    names = set(re.findall(r"\b((?:gateway|batching|encoder|decoder|accelerator|limits)(?:\.[a-z_]+)+)", text))
    assert len(names) > 10
    for name in names:
        values: Any = ServingConfig()
        for part in name.split("."):
            assert part in type(values).model_fields, f"{name} is no setting"
            values = getattr(values, part)


def test_burn_rates_agree_with_the_objective() -> None:
    """Pages at 2 % of the month's budget in an hour and 5 % in six, a ticket at what just spends it."""
    month_h = 30 * 24
    for kind in ("Availability", "Latency"):
        for name, window_h, share in (("Fast", 1, 0.02), ("Steady", 6, 0.05)):
            (burn,) = set(re.findall(r"> (\S+) \* 0\.001", ALERTS[f"Vae{kind}Burns{name}"]["expr"]))
            assert float(burn) == pytest.approx(share * month_h / window_h)
        assert re.findall(r"> (\S+) \* 0\.001", ALERTS[f"Vae{kind}BurnsSlow"]["expr"]) == ["1", "1"]
