"""The architecture is a test: layers, what may be imported, and a test file for every module."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

WITHOUT_OWN_TEST = {
    "serving/__main__.py": "see tests/serving/test_cli.py",
    "serving/demo.py": "see tests/end_to_end",
    "serving/replicas.py": "see tests/end_to_end",
    "serving/scaling.py": "see tests/serving/test_app.py",
    "serving/standalone.py": "see tests/end_to_end; every test of the gateway runs it",
    "serving/engine/protocol.py": "types alone",
    "training/__main__.py": "see tests/training/test_cli.py",
}


def _modules(package: str) -> list[str]:
    return sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py"
    )


def test_the_import_contracts_hold() -> None:
    """Arrows point one way: edges, operations, values; who may know Ray, gRPC and torch is written down."""
    command = [str(BIN / "lint-imports"), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("module", [*_modules("serving"), *_modules("training")])
def test_every_module_has_a_test_file(module: str) -> None:
    """`serving/bundle.py` is tested by `tests/serving/test_bundle.py`, or the list says why not."""
    path = Path(module)
    own = ROOT / "tests" / path.parent / f"test_{path.name}"
    assert own.exists() or module in WITHOUT_OWN_TEST, f"write {own.relative_to(ROOT)}"


def test_the_list_of_exceptions_names_real_modules() -> None:
    """An exception goes when its module goes."""
    assert set(WITHOUT_OWN_TEST) <= {*_modules("serving"), *_modules("training")}


def _imported_by(module: str) -> set[str]:
    code = f"import json, sys, {module}; print(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return set(json.loads(result.stdout))


@pytest.mark.parametrize(
    ("module", "strangers"),
    [
        (
            "serving.client",
            {
                "pydantic",
                "ray",
                "onnxruntime",
                "yaml",
                "fsspec",
                "prometheus_client",
                "typer",
                "rich",
                "torch",
                "onnx",
                "PIL",
                "scipy",
            },
        ),
        ("serving.cli", {"torch", "ray", "onnxruntime", "onnx", "sklearn", "matplotlib"}),
        ("serving.gateway.server", {"torch", "ray", "onnxruntime", "typer", "rich", "opentelemetry"}),
        ("serving.standalone", {"torch", "ray", "typer", "rich", "onnx", "opentelemetry"}),
        ("training", {"ray", "grpc", "onnxruntime"}),
        ("training.cli", {"ray", "grpc", "sklearn", "scipy", "matplotlib", "onnx"}),
    ],
)
def test_an_import_brings_no_strangers(module: str, strangers: set[str]) -> None:
    """The client needs three packages, the command line starts without Ray and torch."""
    assert not _imported_by(module) & strangers
