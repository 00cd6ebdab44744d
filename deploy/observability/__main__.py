"""Write what is made from something else: dashboards, PrometheusRule, the table of metrics."""

from pathlib import Path

from deploy.observability import grafana, prometheus_rule, reference

FOLDER = Path(__file__).parent


def main() -> None:
    """Write each file beside this one."""
    for name, text in grafana.files().items():
        (FOLDER / "dashboards" / name).write_text(text)
    rules = (FOLDER / "rules.yaml").read_text()
    (FOLDER / "prometheusrule.yaml").write_text(prometheus_rule.wrapped(rules))
    readme = FOLDER / "README.md"
    readme.write_text(reference.replaced_in(readme.read_text()))


if __name__ == "__main__":
    main()
