"""`vae-serve keys`: makes API keys and shows what is known of them. A key itself is shown once, and never kept."""

import json
import os
import re
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final

import typer
import yaml
from rich.console import Console
from rich.table import Table

from serving import api_keys
from serving.api_keys import ApiKey
from serving.errors import CredentialsError

keys_app = typer.Typer(no_args_is_help=True, help="Make and list API keys.")

_HEADER: Final = (
    "# Digests of API keys. `vae-serve keys new NAME --file FILE` adds one; delete an entry to revoke it.\n"
)
_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_PRIVATE: Final = 0o600

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@keys_app.command()
def new(
    name: Annotated[str, typer.Argument(help="Whose key it is; several keys may share a name.")],
    file: Annotated[Path | None, typer.Option(help="YAML file to add its digest to; made if absent.")] = None,
    expires: Annotated[str | None, typer.Option(help="Time for which it is valid: 90d, 12h or 2w.")] = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer: flags are booleans
) -> None:
    """Make a key, print it once, and keep its digest."""
    try:
        api_keys.check_name(name)
        now = datetime.now(UTC).replace(microsecond=0)
        until = now + _duration(expires) if expires is not None else None
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter(str(error)) from None
    if file is None and until is not None:
        raise typer.BadParameter("a key that expires needs a --file: the variable has no place for the time")
    secret = api_keys.new_key()
    key = ApiKey(name, api_keys.digest_of(secret), now, until)
    if file is not None:
        _write(file, [*_read(file, missing_ok=True), key])
    if as_json:
        typer.echo(json.dumps({"key": secret, **_plain(key)}))
        return
    typer.echo(secret)
    # On standard error, so that the key alone can be piped on.
    typer.echo("This key is shown once; give it to its client now.", err=True)
    typer.echo(f"{name}:{key.sha256}" if file is None else f"Its digest was added to {file}.", err=True)


@keys_app.command(name="list")
def list_keys(
    file: Annotated[Path, typer.Option(help="YAML file of keys.")],
    as_json: AsJson = False,  # noqa: FBT002 - typer: flags are booleans
) -> None:
    """List the keys of a file."""
    now = datetime.now(UTC)
    rows = [{**_plain(key), "is_expired": key.is_expired(now)} for key in _read(file)]
    if as_json:
        typer.echo(json.dumps({"keys": rows}))
        return
    table = Table("name", "sha256", "created", "expires")
    for row in rows:
        until = f"{row.get('expires', 'never')}{' (expired)' if row['is_expired'] else ''}"
        table.add_row(row["name"], f"{row['sha256'][:12]}...", row.get("created", ""), until)
    Console().print(table)


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"([1-9]\d{0,5})([mhdw])", text)
    if match is None:
        raise ValueError(f"--expires {text!r}: expected a number and m, h, d or w, such as 90d")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def _plain(key: ApiKey) -> dict[str, Any]:
    """Return a key as text, without the times it does not have."""
    times = {"created": key.created, "expires": key.expires}
    return {"name": key.name, "sha256": key.sha256} | {
        field: f"{time:%Y-%m-%dT%H:%M:%SZ}" for field, time in times.items() if time is not None
    }


def _read(file: Path, *, missing_ok: bool = False) -> list[ApiKey]:
    """Return the keys of a file.

    Raises:
        CredentialsError: If it cannot be read or is not a file of keys.
    """
    try:
        return api_keys.parse_file(file.read_bytes())
    except FileNotFoundError:
        if missing_ok:
            return []
        raise CredentialsError(
            source=str(file), problem="does not exist; `vae-serve keys new` makes one"
        ) from None
    except OSError as error:
        raise CredentialsError(source=str(file), problem=f"cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CredentialsError(source=str(file), problem=str(error)) from None


def _write(file: Path, keys: list[ApiKey]) -> None:
    """Replace a file at once: a service that reads it sees the old keys or the new ones, never half of them.

    A new file is its user's alone; an old one keeps its mode, so that a service that runs as another user of the
    group can still read it.

    Raises:
        CredentialsError: If it cannot be written.
    """
    target = file.resolve()  # behind a link, so that the link stays one
    content = _HEADER + yaml.safe_dump([_plain(key) for key in keys], sort_keys=False)
    try:
        mode = target.stat().st_mode & 0o777 if target.exists() else _PRIVATE
        with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=f".{target.name}.", delete=False) as draft:
            try:
                draft.write(content)
                draft.flush()
                os.fsync(draft.fileno())
                os.fchmod(draft.fileno(), mode)
                Path(draft.name).replace(target)
            except BaseException:
                Path(draft.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise CredentialsError(source=str(file), problem=f"cannot be written ({error.strerror})") from None
