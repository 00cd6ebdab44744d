"""`vae-serve keys` shows a key once, keeps its digest, and lists what is kept."""

import json
import stat
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from serving import api_keys
from serving.errors import CredentialsError
from serving.keys_command import keys_app

DIGEST = "ab" * 32


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(keys_app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_a_new_key_is_shown_once_and_its_digest_kept(tmp_path: Path) -> None:
    """Standard output is the key alone; the file holds its digest, for its user alone."""
    file = tmp_path / "keys.yaml"
    key = _run("new", "team-a", "--file", file).stdout.strip()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert key not in file.read_text()
    (kept,) = api_keys.parse_file(file.read_bytes())
    assert (kept.name, kept.sha256, kept.expires) == ("team-a", api_keys.digest_of(key), None)
    assert list(tmp_path.iterdir()) == [file]


def test_a_second_key_joins_the_first(tmp_path: Path) -> None:
    """Keys are added, whoever wrote the others, and a mode that lets a group read is kept."""
    file = tmp_path / "keys.yaml"
    file.write_text(f"# ours\n- {{name: a, sha256: {DIGEST}}}\n")
    file.chmod(0o640)
    result = json.loads(_run("new", "a", "--file", file, "--expires", "90d", "--json").stdout)
    first, second = api_keys.parse_file(file.read_bytes())
    assert first.sha256 == DIGEST
    assert second.sha256 == result["sha256"] == api_keys.digest_of(result["key"])
    assert second.created is not None
    assert second.expires == second.created + timedelta(days=90)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_a_link_to_a_file_stays_a_link(tmp_path: Path) -> None:
    """The file behind the link is replaced."""
    file, link = tmp_path / "keys.yaml", tmp_path / "link.yaml"
    file.write_text("[]")
    link.symlink_to(file)
    _run("new", "a", "--file", link)
    assert link.is_symlink()
    assert len(api_keys.parse_file(file.read_bytes())) == 1


def test_without_a_file_the_line_for_the_variable_is_shown() -> None:
    """What the variable needs comes on standard error, beside the key on standard output."""
    result = _run("new", "a")
    key = result.stdout.strip()
    assert f"a:{api_keys.digest_of(key)}" in result.stderr
    assert api_keys.parse_variable(f"a:{api_keys.digest_of(key)}")[0].name == "a"


@pytest.mark.parametrize(
    "arguments",
    [
        ("a b",),
        ("a", "--expires", "90d"),
        ("a", "--file", "x", "--expires", "soon"),
        ("a", "--file", "x", "--expires", "0d"),
        ("a", "--file", "x", "--expires", "999999w"),
    ],
)
def test_a_wrong_command_makes_no_key(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name or a time that is not fit is a usage error, and leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    result = _run("new", *arguments)
    assert result.exit_code == 2
    assert "vae_" not in result.stdout
    assert not list(tmp_path.iterdir())


def test_a_bad_file_is_left_as_it_is(tmp_path: Path) -> None:
    """Nothing is added to a file that is no file of keys."""
    file = tmp_path / "keys.yaml"
    file.write_text("name: a\n")
    with pytest.raises(CredentialsError, match="expected a list"):
        _run("new", "a", "--file", file)
    assert yaml.safe_load(file.read_text()) == {"name": "a"}


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    """A folder that is not there is said, and no key is shown."""
    with pytest.raises(CredentialsError, match="cannot be written"):
        _run("new", "a", "--file", tmp_path / "none" / "keys.yaml")


def test_keys_are_listed(tmp_path: Path) -> None:
    """Names, times and whether they have expired; for people the digest is cut."""
    file = tmp_path / "keys.yaml"
    file.write_text(f"- {{name: a, sha256: {DIGEST}, expires: 2020-01-01T00:00:00Z}}")
    (key,) = json.loads(_run("list", "--file", file, "--json").stdout)["keys"]
    assert key == {"name": "a", "sha256": DIGEST, "expires": "2020-01-01T00:00:00Z", "is_expired": True}
    shown = _run("list", "--file", file).stdout
    assert "expired" in shown
    assert DIGEST not in shown
    with pytest.raises(CredentialsError, match="does not exist"):
        _run("list", "--file", tmp_path / "none")


def test_the_command_needs_no_heavy_package() -> None:
    """Making a key must not wait for Ray, ONNX Runtime or gRPC to be imported."""
    code = "import sys, serving.keys_command; print(*sorted({'ray', 'onnxruntime', 'grpc'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""
