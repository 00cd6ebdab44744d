"""The command line, as people use it: exit codes, one-line errors, files."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from serving import api_keys, cli
from serving import config as configuration
from serving.demo import free_port
from tests.bundles import small_bundle
from tests.certificates import Authority, ServerFiles

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 60
MAX_ROWS = 4
KEY = "vae_a-key-that-nobody-may-see"


class Result(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def facts(self) -> dict[str, Any]:
        """Standard output as JSON."""
        facts: dict[str, Any] = json.loads(self.out)
        return facts


Command = Callable[..., Result]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Return a function that runs the command line in this process."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["vae-serve", *map(str, arguments)])
        capsys.readouterr()
        code = cli.run()
        return Result(code, *capsys.readouterr())

    return run


def _wrong(result: Result, code: int = 2) -> str:
    """Return the one line of a command that failed as it should."""
    assert result.code == code, result
    assert result.out == ""
    (line,) = result.err.splitlines()
    assert line.startswith("vae-serve: ")
    assert "Traceback" not in line
    return line.removeprefix("vae-serve: ")


def _up(bundle: Path, *arguments: object, environment: dict[str, str] | None = None) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "serving", "up", "--bundle", str(bundle), "--engine", "in-process"]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "default"} | (environment or {}),
    )


@pytest.fixture(scope="module")
def target(bundle_dir: Path) -> Iterator[str]:
    """Run `vae-serve up` with a small limit of rows; return its address; stop it as an operator does."""
    with _up(bundle_dir, "--port", 0, "--set", f"limits.max_rows={MAX_ROWS}") as process:
        assert process.stdout is not None
        first, secured, *tries = [process.stdout.readline() for _ in range(4)]
        assert first.startswith("SERVING at 127.0.0.1:"), first
        assert secured == "  secured: plaintext on loopback; anybody may call\n"
        try:
            yield first.split()[2]
        finally:
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=START_TIMEOUT_S)
        assert process.returncode == 0
        assert all(line.startswith("  try: vae-serve ") for line in tries)
        assert out == ""
        events = [json.loads(line)["event"] for line in err.splitlines()]
        assert "call" in events
        ours = [event for event in events if event != "call"]
        assert ours == ["gateway listens", "health changed", "gateway drains", "gateway stopped"]


@pytest.fixture
def pixels(tmp_path: Path, seed: int) -> Path:
    """Return a file of ten rows of pixels: more than one call may have."""
    path = tmp_path / "pixels.npy"
    np.save(path, np.random.default_rng(seed).integers(0, 256, (10, 1, 4, 4), dtype=np.uint8))
    return path


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    """Return a file of ten equal rows of latents."""
    path = tmp_path / "latents.npy"
    np.save(path, np.zeros((10, 2), np.float32))
    return path


def test_check_verifies_a_bundle(command: Command, bundle_dir: Path) -> None:
    """A good bundle is described, as JSON or as a table."""
    result = command("check", "--bundle", bundle_dir, "--json")
    assert (result.code, result.err) == (0, "")
    assert result.facts["data_shape"] == [1, 4, 4]
    assert result.facts["providers"] == ["CPUExecutionProvider"] * 2
    assert "bundle verified" in command("check", "--bundle", bundle_dir).out


def test_check_refuses_a_damaged_bundle(command: Command, tmp_path: Path) -> None:
    """A flipped byte is exit code 2 and a line that names the file."""
    folder = small_bundle(tmp_path / "b")
    content = bytearray((folder / "decoder.onnx").read_bytes())
    content[100] ^= 1
    (folder / "decoder.onnx").write_bytes(content)
    assert "decoder.onnx has SHA-256" in _wrong(command("check", "--bundle", folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check"], "no bundle: give --bundle DIR"),
        (["check", "--bundle", "/nowhere"], "there is no manifest.json"),
        (["check", "--bundle", "x", "--set", "limits.max_rows=0"], "limits.max_rows: "),
        (["check", "--bundle", "x", "--set", "limits.rows=1"], "no such key"),
        (["check", "--bundle", "x", "--set", "bundle=[e"], "not valid YAML"),
        (["check", "--config", "/nowhere.yaml"], "configuration file /nowhere.yaml"),
        (["check", "--bundel", "x"], "--bundel"),
        (["fly"], "fly"),
        (["sample", "--num", "many"], "--num"),
        (["decode", "x.npy", "--observation", "median"], "median"),
        (["encode", "/nowhere.npy"], "/nowhere.npy: not a readable .npy file"),
        (["up", "--bundle", "x", "--engine", "steam"], "engine: "),
        (["up", "--bundle", "x", "--port", "99999"], "gateway.port: "),
        (["status", "--cert", "x.pem"], "--cert and --key go together"),
        (["status", "--ca", "/nowhere.pem"], "/nowhere.pem"),
        (["status", "--ca", __file__], "holds no certificates in PEM"),
        (["status", "--cert", __file__, "--key", __file__], "no certificate and its key in PEM"),
        (["status", "--api-key-file", "/nowhere"], "/nowhere: cannot be read as a key or token"),
        (["status", "--token-file", __file__], "expected one key or token, found "),
        (["status", "--api-key-file", "x", "--token-file", "y"], "not both"),
        (["status", "--priority", "4"], "--priority"),
        (["score", "/nowhere.npy"], "/nowhere.npy: not a readable .npy file"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(command: Command, arguments: list[str], message: str) -> None:
    """Whatever is wrong with a command, its configuration or its bundle is one line that says what."""
    assert message in _wrong(command(*arguments))


def test_an_ipv6_address_may_be_listened_on(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    """A host in brackets is an address, not a list."""
    seen: list[str] = []

    async def remember(settings: Any) -> None:  # noqa: ANN401 - stands for the service
        seen.append(settings.gateway.host)

    monkeypatch.setattr(cli, "_up_in_process", remember)
    assert command("up", "--bundle", "x", "--engine", "in-process", "--host", "[::1]").err == ""
    assert seen == ["[::1]"]


def test_a_bundle_may_be_given_by_an_override(command: Command, bundle_dir: Path, tmp_path: Path) -> None:
    """A file without a bundle and an override with one are a configuration."""
    (tmp_path / "c.yaml").write_text("device: cpu\n")
    assert command("check", "--config", tmp_path / "c.yaml", "--set", f"bundle={bundle_dir}", "--json").code == 0


def test_help_is_shown(command: Command) -> None:
    """Asking for help is no error."""
    result = command("--help")
    assert result.code == 0
    assert "interpolate" in result.out


def _write_npz(path: Path) -> None:
    np.savez(path, a=np.zeros(3))


@pytest.mark.parametrize(
    "write",
    [
        _write_npz,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 broken"),
        lambda path: path.write_bytes(b"\x93NUMPY"),
        lambda path: path.write_text("hello"),
        lambda path: np.save(path, np.array([{"a": 1}], object)),
        lambda path: np.save(path, np.array(3.0)),
        lambda path: np.save(path, np.zeros((0, 2))),
        lambda path: np.save(path, np.array([["a", "b"]])),
    ],
    ids=["npz", "empty", "broken zip", "broken npy", "text", "pickle", "scalar", "no rows", "strings"],
)
def test_a_file_that_holds_no_rows_is_refused(
    command: Command, target: str, tmp_path: Path, write: Callable[[Path], object]
) -> None:
    """Whatever is in the file, the answer is one line that names it."""
    path = tmp_path / "rows.npy"
    if write is _write_npz:
        write(tmp_path / "rows.npz")
        path = tmp_path / "rows.npz"
    else:
        write(path)
    assert str(path) in _wrong(command("decode", path, "--target", target))


def test_status_says_what_is_served(command: Command, target: str) -> None:
    """A healthy service is exit code 0, with its limits."""
    result = command("status", "--target", target, "--json")
    assert (result.code, result.err) == (0, "")
    assert result.facts["name"] == "small"
    assert result.facts["limits"]["max_rows"] == MAX_ROWS
    assert "SERVING" in command("status", "--target", target).out


def test_status_without_a_service_is_exit_code_1(command: Command) -> None:
    """A service that cannot be reached is one line and exit code 1."""
    result = command("status", "--target", f"127.0.0.1:{free_port()}", "--timeout", "0.2")
    assert "DEADLINE_EXCEEDED" in _wrong(result, code=1)


def test_an_error_of_the_service_is_exit_code_1(command: Command, target: str, tmp_path: Path) -> None:
    """Bad input is what the service says of it, in one line."""
    np.save(tmp_path / "bad.npy", np.zeros((2, 3), np.float32))
    result = command("decode", tmp_path / "bad.npy", "--target", target)
    assert "INVALID_ARGUMENT: latents.shape: expected shape (rows, 2), got (2, 3)" in _wrong(result, code=1)


def test_encode_writes_posteriors(command: Command, target: str, pixels: Path, tmp_path: Path) -> None:
    """Rows beyond the limit of one call are encoded in parts, in order."""
    result = command(
        "encode", pixels, "--out", tmp_path / "z.npz", "--num-latents", 1, "--seed", 3, "--target", target
    )
    assert result.code == 0
    with np.load(tmp_path / "z.npz") as arrays:
        assert {name: arrays[name].shape for name in arrays} == {
            "mean": (10, 2),
            "log_var": (10, 2),
            "latents": (10, 1, 2),
        }
        whole = arrays["mean"]
    part = tmp_path / "part.npy"
    np.save(part, np.load(pixels)[7:8])
    command("encode", part, "--out", tmp_path / "part.npz", "--target", target)
    with np.load(tmp_path / "part.npz") as arrays:
        np.testing.assert_array_equal(arrays["mean"], whole[7:8])


def test_draws_are_split_over_calls_and_equal_those_of_fewer(
    command: Command, target: str, pixels: Path, tmp_path: Path
) -> None:
    """Several draws a row take several rows of the limit; the first draws do not depend on how many there are."""
    for draws in (1, 3):
        out = tmp_path / f"{draws}.npz"
        done = command("encode", pixels, "--out", out, "--num-latents", draws, "--seed", 3, "--target", target)
        assert done.code == 0, done.err
    with np.load(tmp_path / "1.npz") as one, np.load(tmp_path / "3.npz") as three:
        assert three["latents"].shape == (10, 3, 2)
        np.testing.assert_array_equal(one["latents"][:, 0], three["latents"][:, 0])


def test_without_a_file_the_first_row_is_shown(command: Command, target: str, latents: Path) -> None:
    """The answer is one JSON object with shapes and the first row."""
    facts = command("decode", latents, "--target", target).facts
    assert facts["reconstruction"]["shape"] == [10, 1, 4, 4]
    assert len(facts["reconstruction"]["first_row"]) == 16
    assert len(facts["model_version"]) == 12


def test_more_samples_than_one_call_may_have_equal_one_draw(
    command: Command, target: str, tmp_path: Path, bundle_dir: Path
) -> None:
    """Eleven samples in three calls are the samples of one call, bit for bit."""
    result = command("sample", "--num", 11, "--seed", 5, "--out", tmp_path / "many.npy", "--target", target)
    assert result.facts["seed"] == 5
    with _up(bundle_dir, "--port", 0) as process:
        assert process.stdout is not None
        other = process.stdout.readline().split()[2]
        command("sample", "--num", 11, "--seed", 5, "--out", tmp_path / "one.npy", "--target", other)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=START_TIMEOUT_S)
        assert process.returncode == 0
    assert (tmp_path / "many.npy").read_bytes() == (tmp_path / "one.npy").read_bytes()


def test_scores_are_written_and_the_most_unusual_rows_named(
    command: Command, target: str, pixels: Path, tmp_path: Path
) -> None:
    """Rows beyond the limit of one call are scored in parts; the lowest come first, and parts add up."""
    options = ("--num-latents", 2, "--seed", 3, "--target", target)
    facts = command("score", pixels, "--out", tmp_path / "all.npz", *options).facts
    with np.load(tmp_path / "all.npz") as arrays:
        score = arrays["score"]
        np.testing.assert_allclose(score, arrays["log_likelihood"] - arrays["kl"], rtol=1e-5)
    assert score.shape == (10,)
    assert facts["mean_score"] == pytest.approx(float(score.mean()), abs=1e-3)
    assert [entry["row"] for entry in facts["most_anomalous"]] == np.argsort(score)[:5].tolist()
    command("score", pixels, "--out", tmp_path / "one.npy", *options)
    np.testing.assert_array_equal(np.load(tmp_path / "one.npy"), score)
    command(
        "score",
        pixels,
        "--bound",
        "importance-weighted",
        "--out",
        tmp_path / "tighter.npy",
        "--priority",
        3,
        *options,
    )
    assert np.load(tmp_path / "tighter.npy").mean() > score.mean()


@pytest.fixture(scope="module")
def guarded(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Run `vae-serve up` with mutual TLS and a key; return its address, and a folder with what opens it."""
    folder = tmp_path_factory.mktemp("guarded")
    authority = Authority()
    files = ServerFiles.write(folder, authority.issue(), authority)
    authority.issue("alice").write(folder, "alice")
    (folder / "ca.crt").write_bytes(authority.certificate)
    (folder / "alice.key.txt").write_text(f"{KEY}\n")
    tls = {"certificate": files.certificate, "private_key": files.private_key, "client_ca": files.client_ca}
    overrides = [part for name, path in tls.items() for part in ("--set", f"gateway.tls.{name}={path}")]
    environment = {"VAE_API_KEYS": f"alice:{api_keys.digest_of(KEY)}"}
    with _up(bundle_dir, "--port", 0, *overrides, environment=environment) as process:
        assert process.stdout is not None
        first, secured, status, _ = [process.stdout.readline() for _ in range(4)]
        assert secured == "  secured: mutual TLS; callers need a client certificate or an API key\n"
        assert status.endswith(" --ca CA.pem --cert CERT.pem --key KEY.pem --api-key-file FILE\n")
        try:
            yield first.split()[2], folder
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=START_TIMEOUT_S)


def test_a_guarded_service_is_called_with_files(
    command: Command, guarded: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Certificates and keys come from files, a key from the environment too, and each command takes them."""
    target, folder = guarded
    own = ("--ca", folder / "ca.crt", "--cert", folder / "alice.crt", "--key", folder / "alice.key")
    for more in ((), ("--api-key-file", folder / "alice.key.txt"), ("--token-file", folder / "alice.key.txt")):
        result = command("status", *own, *more, "--target", target, "--json")
        assert (result.code, result.facts["name"]) == (0, "small")
    monkeypatch.setenv("VAE_API_KEY", KEY)
    out = tmp_path / "s.npy"
    assert command("sample", "--num", 2, "--out", out, *own, "--target", target).code == 0
    monkeypatch.setenv("VAE_API_KEY", "vae_wrong-key")
    line = _wrong(command("status", *own, "--target", target), code=1)
    assert line.startswith("UNAUTHENTICATED: ")
    assert "wrong-key" not in line


def test_a_key_is_not_sent_in_plaintext_to_another_machine(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key in the environment and a target without TLS are one line, and nothing is sent."""
    monkeypatch.setenv("VAE_API_KEY", KEY)
    line = _wrong(command("status", "--target", "vae.example:50051"))
    assert line == (
        "--target vae.example:50051: a key or token is never sent in plaintext to another machine; "
        "give credentials (TLS)"
    )


def test_keys_are_made_on_the_command_line(command: Command, tmp_path: Path) -> None:
    """`vae-serve keys` is part of the command line."""
    assert command("keys", "new", "alice", "--file", tmp_path / "keys.yaml").out.startswith(api_keys.PREFIX)
    assert "alice" in command("keys", "list", "--file", tmp_path / "keys.yaml").out


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], ("plaintext on loopback; anybody may call", "")),
        (["gateway.host=0.0.0.0"], ("plaintext, as allowed; anybody may call", "")),
        (
            ["gateway.tls.certificate=c", "gateway.tls.private_key=k", "gateway.auth.api_keys_file=f"],
            ("TLS; callers need an API key", "--ca CA.pem --api-key-file FILE"),
        ),
        (
            ["gateway.auth.jwt={issuer: i, audience: a, jwks: j}"],
            ("plaintext on loopback; callers need a token", "--token-file FILE"),
        ),
    ],
)
def test_up_says_how_it_is_secured(overrides: list[str], expected: tuple[str, str]) -> None:
    """The transport, who may call, and the options that calling takes."""
    gateway = configuration.load(None).override(overrides).gateway
    secured, options = cli._security(gateway)  # noqa: SLF001 - the line is its product
    assert (secured, " ".join(options)) == expected


def test_the_seed_that_is_told_repeats_the_draw(command: Command, target: str, tmp_path: Path) -> None:
    """A draw without a seed can be repeated with the seed that it printed."""
    first = command("sample", "--num", 9, "--out", tmp_path / "a.npy", "--target", target)
    command("sample", "--num", 9, "--seed", first.facts["seed"], "--out", tmp_path / "b.npy", "--target", target)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


@pytest.mark.parametrize("name", ["decode", "reconstruct"])
def test_the_seed_that_is_told_repeats_the_observations(
    command: Command, target: str, pixels: Path, latents: Path, tmp_path: Path, name: str
) -> None:
    """Observations in several parts without a seed can be repeated with the seed that was printed."""
    source = latents if name == "decode" else pixels
    options = ("--observation", "sample", "--target", target)
    first = command(name, source, "--out", tmp_path / "a.npy", *options)
    command(name, source, "--seed", first.facts["seed"], "--out", tmp_path / "b.npy", *options)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_parts_of_a_draw_do_not_share_their_noise(
    command: Command, target: str, latents: Path, tmp_path: Path
) -> None:
    """Equal rows in different parts of a large call get noise of their own, as they do in one call."""
    command(
        "decode", latents, "--observation", "sample", "--seed", 1, "--out", tmp_path / "a.npy", "--target", target
    )
    drawn = np.load(tmp_path / "a.npy")
    assert (drawn[0] != drawn[MAX_ROWS]).any()


def test_pictures_are_written(command: Command, target: str, pixels: Path, tmp_path: Path) -> None:
    """Samples, reconstructions and paths become PNG files."""
    for arguments in (
        ("sample", "--num", 4, "--seed", 1),
        ("reconstruct", pixels, "--output-type", "uint8"),
        ("interpolate", _two(pixels, tmp_path), "--num-steps", 4, "--path", "spherical"),
    ):
        path = tmp_path / f"{arguments[0]}.png"
        result = command(*arguments, "--out", path, "--target", target)
        assert result.code == 0, result
        with Image.open(path) as image:
            assert min(image.size) > 56


def _two(pixels: Path, tmp_path: Path) -> Path:
    path = tmp_path / "two.npy"
    np.save(path, np.load(pixels)[:2])
    return path


def test_interpolate_walks_from_row_to_row(command: Command, target: str, tmp_path: Path) -> None:
    """Two rows of latents make one path."""
    np.save(tmp_path / "ends.npy", np.array([[0, 0], [1, 1]], np.float32))
    result = command(
        "interpolate", tmp_path / "ends.npy", "--kind", "latents", "--num-steps", 3, "--target", target
    )
    assert result.facts["observations"]["shape"] == [1, 3, 1, 4, 4]


@pytest.mark.parametrize("name", ["out.txt", "missing/out.npy"])
def test_a_file_that_cannot_be_written_is_one_line(
    command: Command, target: str, latents: Path, tmp_path: Path, name: str
) -> None:
    """An unknown kind of file is refused; a folder that does not exist is made or named, not a stack."""
    result = command("decode", latents, "--out", tmp_path / name, "--target", target)
    if result.code:
        assert name in _wrong(result)
    else:
        assert (tmp_path / name).exists()


def test_rows_beyond_the_largest_message_go_in_parts(command: Command, bundle_dir: Path, tmp_path: Path) -> None:
    """A file within the limit of rows but beyond that of bytes is sent in smaller parts."""
    np.save(tmp_path / "rows.npy", np.zeros((4000, 1, 4, 4), np.float32))
    with _up(bundle_dir, "--port", 0, "--set", "limits.max_request_bytes=65536") as process:
        assert process.stdout is not None
        other = process.stdout.readline().split()[2]
        result = command("reconstruct", tmp_path / "rows.npy", "--out", tmp_path / "out.npy", "--target", other)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=START_TIMEOUT_S)
    assert result.code == 0, result
    assert len(np.load(tmp_path / "out.npy")) == 4000


def _ended(process: "subprocess.Popen[str]") -> Result:
    out, err = process.communicate(timeout=START_TIMEOUT_S)
    return Result(process.returncode, out, err)


def test_up_on_a_taken_port_is_one_line(bundle_dir: Path, target: str) -> None:
    """A second service on the same port ends with exit code 2, and the first one lives on."""
    with _up(bundle_dir, "--port", target.split(":")[1]) as process:
        result = _ended(process)
    lines = [line for line in result.err.splitlines() if not line.startswith("{")]
    assert (result.code, result.out, len(lines)) == (2, "", 1)
    assert lines[0].startswith(f"vae-serve: cannot listen on {target}: ")


def test_up_with_cuda_and_no_gpu_is_one_line(bundle_dir: Path) -> None:
    """A device that is not there ends with exit code 2; nothing falls back in silence."""
    with _up(bundle_dir, "--port", 0, "--device", "cuda") as process:
        line = process.stdout.readline() if process.stdout else ""
        if line:  # there is a GPU
            process.send_signal(signal.SIGTERM)
        result = _ended(process)
    if line:
        pytest.skip("this machine has a GPU")
    assert (result.code, result.out) == (2, "")
    (only,) = result.err.splitlines()
    assert only.startswith("vae-serve: CUDAExecutionProvider was asked for ")


def test_up_that_does_not_come_up_in_time_is_one_line(bundle_dir: Path) -> None:
    """A start that takes longer than allowed is a StartupError like any other."""
    with _up(bundle_dir, "--port", 0, "--set", "start_timeout_s=1e-9") as process:
        if process.stdout and (line := process.stdout.readline()):
            process.send_signal(signal.SIGTERM)
            _ended(process)
            pytest.skip(f"it came up in no time: {line}")
        result = _ended(process)
    assert result.code == 2
    assert "Traceback" not in result.err
