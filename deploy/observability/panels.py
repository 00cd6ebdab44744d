"""What the dashboards show: sections of panels, and the PromQL of each line in them."""

from typing import Final, Literal, NamedTuple

Kind = Literal["lines", "stacked", "number"]

ROWS: Final = "suffix: rows/s"

RATE: Final = "$__rate_interval"
"""Grafana's own: at least four scrapes."""

JOB: Final = 'job=~"$job"'
"""Selects what the dashboard's variable `job` selects: one service, several, or all."""

_ONCE_EMPTY: Final = "a series appears with its first error"


class Query(NamedTuple):
    """One expression of a panel."""

    expr: str
    legend: str = ""
    """Name of each line; `{{label}}` is its value."""

    may_be_empty: str = ""
    """Why it may have no data where all is well; empty if it always has."""


class Panel(NamedTuple):
    """One panel."""

    title: str
    help: str
    """What it says, and what to look for."""

    unit: str
    """Grafana's name of the unit."""

    queries: tuple[Query, ...]
    kind: Kind = "lines"


class Section(NamedTuple):
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


class Board(NamedTuple):
    """One dashboard."""

    uid: str
    title: str
    description: str
    sections: tuple[Section, ...]


def _rate(name: str, by: str, labels: str = "") -> str:
    """Return the rate of a counter, summed by labels."""
    selector = f"{JOB},{labels}" if labels else JOB
    return f"sum by ({by}) (rate({name}{{{selector}}}[{RATE}]))"


def _quantile(share: float, name: str, by: str) -> str:
    """Return a quantile of a histogram for each value of a label."""
    return f"histogram_quantile({share}, {_rate(f'{name}_bucket', f'le, {by}')})"


def _mean(name: str, by: str) -> str:
    """Return the mean of what a histogram observed."""
    return f"{_rate(f'{name}_sum', by)} / {_rate(f'{name}_count', by)}"


def _share(name: str, bound: str, by: str) -> str:
    """Return the larger share of a gauge in its bound."""
    return f"max by ({by}) ({name}{{{JOB}}} / {bound}{{{JOB}}})"


GLANCE: Final = Section(
    "At a glance",
    (
        Panel(
            "Ready",
            "1 if every gateway answers with both graphs.",
            "short",
            (Query(f"min(vae_ready{{{JOB}}})"),),
            "number",
        ),
        Panel(
            "Calls", "Calls that end, each second.", "reqps", (Query(_rate("vae_calls_total", "job")),), "number"
        ),
        Panel(
            "Failed by us",
            "Share of calls that fail by our fault, five minutes.",
            "percentunit",
            (
                Query(
                    f"sum(job_method:vae_calls_failed:rate5m{{{JOB}}})"
                    f" / sum(job_method:vae_calls:rate5m{{{JOB}}})",
                    may_be_empty="needs the recording rules, and calls in the last five minutes",
                ),
            ),
            "number",
        ),
        Panel(
            "99 % of calls within",
            "All methods together.",
            "s",
            (Query(_quantile(0.99, "vae_call_latency_seconds", "job")),),
            "number",
        ),
        Panel(
            "Rows", "Rows that are run, each second.", ROWS, (Query(_rate("vae_batch_rows_sum", "job")),), "number"
        ),
        Panel(
            "Versions of the model",
            "More than one for longer than an upgrade takes is skew.",
            "short",
            (Query(f"count(count by (version) (vae_replica_model{{{JOB}}} or vae_model_info{{{JOB}}}))"),),
            "number",
        ),
    ),
)

TRAFFIC: Final = Section(
    "Traffic",
    (
        Panel(
            "Calls by method",
            "Calls that end, each second.",
            "reqps",
            (Query(_rate("vae_calls_total", "method") + " > 0", "{{method}}"),),
            "stacked",
        ),
        Panel(
            "Calls by code",
            "How they end, as a gRPC status code.",
            "reqps",
            (Query(_rate("vae_calls_total", "code") + " > 0", "{{code}}"),),
            "stacked",
        ),
        Panel(
            "Calls in flight",
            "Begun and not ended, in each gateway.",
            "short",
            (Query(f"sum by (instance) (vae_calls_in_flight{{{JOB}}})", "{{instance}}"),),
        ),
        Panel(
            "Bytes",
            "Messages as they are on the wire, without HTTP/2's part.",
            "Bps",
            (
                Query(_rate("vae_request_bytes_sum", "job"), "requests"),
                Query(_rate("vae_response_bytes_sum", "job"), "answers"),
            ),
        ),
    ),
)

ERRORS: Final = Section(
    "Errors",
    (
        Panel(
            "Errors by who must act",
            "Client: its request. Load: more than there is room for. Service: we.",
            "reqps",
            (Query(_rate("vae_call_errors_total", "blame"), "{{blame}}", _ONCE_EMPTY),),
            "stacked",
        ),
        Panel(
            "Errors by reason",
            "`vae.v1.ErrorReason`; the access log has the calls.",
            "reqps",
            (Query(_rate("vae_call_errors_total", "reason"), "{{reason}}", _ONCE_EMPTY),),
        ),
        Panel(
            "Burn of the availability budget",
            "1 spends 99.9 % of 30 days just in time. Pages above 14.4 (1 h) and 6 (6 h).",
            "short",
            (
                Query(
                    f"job_method:vae_calls_failed:ratio_rate1h{{{JOB}}} / 0.001",
                    "{{method}}",
                    "needs the recording rules, and calls in the last hour",
                ),
            ),
        ),
        Panel(
            "Burn of the latency budget",
            "As above, for calls slower than the objective.",
            "short",
            (
                Query(
                    f"job_method:vae_calls_slow:ratio_rate1h{{{JOB}}} / 0.001",
                    "{{method}}",
                    "needs the recording rules, and calls in the last hour",
                ),
            ),
        ),
    ),
)

LATENCY: Final = Section(
    "Latency",
    (
        Panel(
            "Half of the calls within",
            "Median by method.",
            "s",
            (Query(_quantile(0.5, "vae_call_latency_seconds", "method"), "{{method}}"),),
        ),
        Panel(
            "99 % of the calls within",
            "By method. Streams last as long as their callers read.",
            "s",
            (Query(_quantile(0.99, "vae_call_latency_seconds", "method"), "{{method}}"),),
        ),
        Panel(
            "Where the time of a call goes",
            "Mean by stage: receive (admission, body), queue, engine (transport included), reply.",
            "s",
            (Query(_mean("vae_call_stage_seconds", "stage"), "{{stage}}"),),
            "stacked",
        ),
        Panel(
            "99 % of the stages within",
            "The stage that grows is the one to look at.",
            "s",
            (Query(_quantile(0.99, "vae_call_stage_seconds", "stage"), "{{stage}}"),),
        ),
    ),
)

BATCHES: Final = Section(
    "Rows and batches",
    (
        Panel(
            "Rows",
            "As gateways and replicas see them. A gap: a replica's first seconds, or work repeated or lost.",
            ROWS,
            (
                Query(_rate("vae_batch_rows_sum", "graph"), "{{graph}}, gateways"),
                Query(_rate("vae_replica_rows_total", "graph"), "{{graph}}, replicas"),
            ),
        ),
        Panel(
            "Rows in a run",
            "Mean. Few rows in many runs cost the most.",
            "short",
            (Query(_mean("vae_batch_rows", "graph"), "{{graph}}"),),
        ),
        Panel(
            "Fill of a run",
            "Mean rows as a share of batching.max_batch_rows.",
            "percentunit",
            (Query(_mean("vae_batch_fill_ratio", "graph"), "{{graph}}"),),
        ),
        Panel(
            "A run takes",
            "99 %: in the gateway, transport included, and inside the replica.",
            "s",
            (
                Query(_quantile(0.99, "vae_batch_run_seconds", "graph"), "{{graph}}, gateway"),
                Query(_quantile(0.99, "vae_replica_run_seconds", "graph"), "{{graph}}, replica"),
            ),
        ),
    ),
)

QUEUE: Final = Section(
    "Queue",
    (
        Panel(
            "Rows that wait",
            "In no run yet.",
            "short",
            (Query(f"sum by (graph) (vae_queue_waiting_rows{{{JOB}}})", "{{graph}}"),),
        ),
        Panel(
            "Share of the queue in use",
            "Rows that wait or run, of the bound above which calls are shed.",
            "percentunit",
            (Query(_share("vae_queue_rows", "vae_queue_limit_rows", "graph"), "{{graph}}"),),
        ),
        Panel(
            "Longest wait",
            "Age of the oldest request now, and 99 % of the waits before a run.",
            "s",
            (
                Query(f"max by (graph) (vae_queue_age_seconds{{{JOB}}})", "{{graph}}, oldest now"),
                Query(_quantile(0.99, "vae_batch_wait_seconds", "graph"), "{{graph}}, 99 %"),
            ),
        ),
        Panel(
            "Rows without an answer",
            "Expired in the queue, abandoned by their caller, or failed.",
            ROWS,
            (
                Query(
                    _rate("vae_rows_dropped_total", "graph, reason") + " > 0",
                    "{{graph}}, {{reason}}",
                    "zero lines are left out",
                ),
            ),
        ),
    ),
)

REPLICAS: Final = Section(
    "Replicas and versions",
    (
        Panel(
            "Replicas that answer",
            "The fewest that any gateway sees, beside the fewest that are configured.",
            "short",
            (
                Query(f"min by (graph) (vae_replicas{{{JOB}}})", "{{graph}}"),
                Query(f"max by (graph) (vae_replicas_min{{{JOB}}})", "{{graph}}, at least"),
            ),
        ),
        Panel(
            "What they serve",
            "Replicas by version, execution provider and precision.",
            "short",
            (
                Query(
                    f"count by (graph, version, provider, precision) (vae_replica_model{{{JOB}}})",
                    "{{graph}} {{version}} {{provider}} {{precision}}",
                ),
            ),
            "stacked",
        ),
        Panel(
            "Rows of each replica",
            "Uneven lines: one is slow, or a connection is lost.",
            ROWS,
            (Query(_rate("vae_replica_rows_total", "graph, instance"), "{{graph}} {{instance}}"),),
        ),
        Panel(
            "Failed runs",
            "Runs of a replica that failed, or whose turn came too late.",
            "ops",
            (Query(_rate("vae_replica_failures_total", "graph, instance"), "{{graph}} {{instance}}"),),
        ),
        Panel(
            "Time to load",
            "Graph, known answers and warm-up: what each new replica costs.",
            "s",
            (Query(f"vae_replica_load_seconds{{{JOB}}}", "{{graph}} {{instance}}"),),
        ),
        Panel(
            "Memory on the GPU",
            "Of the replicas' buffers; zero on a processor.",
            "bytes",
            (Query(f"vae_replica_device_bytes{{{JOB}}}", "{{graph}} {{instance}}"),),
        ),
    ),
)

PROCESSES: Final = Section(
    "Processes",
    (
        Panel(
            "Processor",
            "1 is one processor: all that the event loop of a gateway can use.",
            "short",
            (Query(f"rate(process_cpu_seconds_total{{{JOB}}}[{RATE}])", "{{role}} {{instance}}"),),
        ),
        Panel(
            "Resident memory",
            "A line that only rises is a leak.",
            "bytes",
            (Query(f"process_resident_memory_bytes{{{JOB}}}", "{{role}} {{instance}}"),),
        ),
        Panel(
            "Lag of the event loop",
            "Time until it took notice of the scrape; every call waits as long.",
            "s",
            (Query(f"vae_event_loop_lag_seconds{{{JOB}}}", "{{role}} {{instance}}"),),
        ),
        Panel(
            "Open files",
            "Connections are files; the limit is of the process.",
            "short",
            (Query(f"process_open_fds{{{JOB}}}", "{{role}} {{instance}}"),),
        ),
        Panel(
            "Age",
            "Falls to zero where a process has started again.",
            "s",
            (Query(f"time() - process_start_time_seconds{{{JOB}}}", "{{role}} {{instance}}"),),
        ),
        Panel(
            "Builds",
            "Processes by version of the service and of ONNX Runtime.",
            "short",
            (
                Query(
                    f"count by (version, onnxruntime, ray) (vae_build_info{{{JOB}}})",
                    "{{version}}, ONNX Runtime {{onnxruntime}}, Ray {{ray}}",
                ),
            ),
            "stacked",
        ),
    ),
)

SERVICE: Final = Board(
    "vae-service",
    "vae: service",
    "Calls, errors, latency, batches, queue, replicas and processes. Alerts: deploy/observability/runbook.md.",
    (GLANCE, TRAFFIC, ERRORS, LATENCY, BATCHES, QUEUE, REPLICAS, PROCESSES),
)

SERVE: Final = Section(
    "Ray Serve",
    (
        Panel(
            "Replicas",
            "Those that Serve takes for healthy, beside how many it wants where a deployment scales.",
            "short",
            (
                Query(f"sum by (deployment) (ray_serve_deployment_replica_healthy{{{JOB}}})", "{{deployment}}"),
                Query(
                    f"max by (deployment) (ray_serve_autoscaling_target_replicas{{{JOB}}})",
                    "{{deployment}}, wanted",
                    may_be_empty="only of deployments that scale",
                ),
            ),
        ),
        Panel(
            "Starts",
            "Replicas that were started. A line that keeps rising is a replica that does not live.",
            "short",
            (
                Query(
                    f"sum by (deployment) (ray_serve_deployment_replica_starts_total{{{JOB}}})", "{{deployment}}"
                ),
            ),
        ),
        Panel(
            "Time to start",
            "Mean from the wish for a replica until it answers: process, bundle, warm-up.",
            "ms",
            (
                Query(
                    f"sum by (deployment) (ray_serve_replica_startup_latency_ms_sum{{{JOB}}})"
                    f" / sum by (deployment) (ray_serve_replica_startup_latency_ms_count{{{JOB}}})",
                    "{{deployment}}",
                ),
            ),
        ),
        Panel(
            "Calls through handles",
            "Surveys of health and addresses. Runs have connections of their own, and come here without one.",
            "reqps",
            (Query(_rate("ray_serve_deployment_request_counter_total", "deployment"), "{{deployment}}"),),
        ),
        Panel(
            "Health checks",
            "Mean time that Serve waits for a replica's answer.",
            "ms",
            (Query(_mean("ray_serve_health_check_latency_ms", "deployment"), "{{deployment}}"),),
        ),
        Panel(
            "Failed health checks",
            "Serve replaces a replica after three in a row.",
            "ops",
            (
                Query(
                    _rate("ray_serve_health_check_failures_total", "deployment"),
                    "{{deployment}}",
                    may_be_empty="a series appears with its first failure",
                ),
            ),
        ),
        Panel(
            "Calls that wait in handles",
            "No replica takes them: none is there, or all are at their limit.",
            "short",
            (Query(f"sum by (deployment) (ray_serve_deployment_queued_queries{{{JOB}}})", "{{deployment}}"),),
        ),
        Panel(
            "Controller",
            "Duration of its loop, and the lag of its event loop: a slow controller replaces dead replicas late.",
            "s",
            (
                Query(f"max(ray_serve_controller_control_loop_duration_s{{{JOB}}})", "its loop"),
                Query(
                    "max by (component) ("
                    f"rate(ray_serve_event_loop_scheduling_latency_ms_sum{{{JOB}}}[{RATE}])"
                    f" / rate(ray_serve_event_loop_scheduling_latency_ms_count{{{JOB}}}[{RATE}])) / 1000",
                    "event loop, {{component}}",
                ),
            ),
        ),
    ),
)

NODES: Final = Section(
    "Nodes",
    (
        Panel(
            "Processors in use",
            "Of each node.",
            "percentunit",
            (Query(f"ray_node_cpu_utilization{{{JOB}}} / 100", "{{instance}}"),),
        ),
        Panel(
            "Memory in use",
            "Of each node. Near 1 Ray ends processes.",
            "percentunit",
            (Query(f"ray_node_mem_used{{{JOB}}} / ray_node_mem_total{{{JOB}}}", "{{instance}}"),),
        ),
        Panel(
            "Object store",
            "Runs do not use it: a line that rises is something of Ray's.",
            "bytes",
            (Query(f"ray_object_store_used_memory{{{JOB}}}", "{{instance}}"),),
        ),
        Panel(
            "Disk in use",
            "Ray's log and spilled objects lie there.",
            "percentunit",
            (Query(f"ray_node_disk_utilization_percentage{{{JOB}}} / 100", "{{instance}}"),),
        ),
        Panel(
            "Memory of processes",
            "Resident, by what Ray calls a component.",
            "bytes",
            (Query(f"topk(8, ray_component_rss_bytes{{{JOB}}})", "{{Component}}"),),
        ),
        Panel(
            "Actors",
            "By state; one that is restarting or pending has no room, or does not live.",
            "short",
            (Query(f"sum by (State) (ray_gcs_actors_count{{{JOB}}})", "{{State}}"),),
        ),
        Panel(
            "GPU in use",
            "Of each GPU.",
            "percentunit",
            (
                Query(
                    f"ray_node_gpus_utilization{{{JOB}}} / 100",
                    "{{instance}} {{GpuIndex}}",
                    may_be_empty="where there is no GPU",
                ),
            ),
        ),
        Panel(
            "Memory of GPUs",
            "In use, all processes together.",
            "bytes",
            (
                Query(
                    f"ray_node_gram_used{{{JOB}}} * 1048576",
                    "{{instance}} {{GpuIndex}}",
                    may_be_empty="where there is no GPU",
                ),
            ),
        ),
    ),
)

RAY: Final = Board(
    "vae-ray",
    "vae: Ray",
    "What Ray and Serve say of themselves, beside the service's own numbers; up to ten seconds late.",
    (SERVE, NODES),
)

BOARDS: Final = (SERVICE, RAY)
