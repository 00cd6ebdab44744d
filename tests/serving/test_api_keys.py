"""Keys are made, kept as digests, listed, and read from a file or a variable."""

from datetime import UTC, datetime, timedelta

import pytest

from serving import api_keys

DIGEST = "ab" * 32


def test_keys_are_random_and_fit_for_a_header() -> None:
    """Two keys differ, hold 256 bits, and are plain ASCII with a prefix that scanners find."""
    first, second = api_keys.new_key(), api_keys.new_key()
    assert first != second
    assert first.startswith("vae_")
    assert len(first.removeprefix("vae_")) == 43  # 32 bytes in base64
    assert first.isascii()
    assert first.isprintable()


def test_a_file_of_keys_is_read() -> None:
    """Names, digests and times come back, times as UTC, whether YAML or we parse them."""
    content = f"""
    - {{name: a, sha256: {DIGEST}}}
    - {{name: a, sha256: {"CD" * 32}, created: 2026-01-01T00:00:00Z, expires: "2027-01-01T02:00:00+02:00"}}
    - {{name: b, sha256: {"ef" * 32}, expires: 2027-01-01}}
    """
    first, second, third = api_keys.parse_file(content.encode())
    assert first == api_keys.ApiKey("a", DIGEST)
    assert second == api_keys.ApiKey(
        "a", "cd" * 32, datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)
    )
    assert third.expires == datetime(2027, 1, 1, tzinfo=UTC)
    assert api_keys.parse_file(b"[]") == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("- {name: a", "not YAML, line"),
        ("[" * 5000, "not YAML"),
        ("", "is empty"),
        ("name: a", "expected a list"),
        ("- 3", "key 1: expected name, sha256"),
        ("- {name: a}", "key 1: expected name, sha256"),
        (f"- {{name: a, sha256: {DIGEST}, key: x}}", "nothing else"),
        (f"- {{name: 'a b', sha256: {DIGEST}}}", "name 'a b'"),
        (f"- {{name: '', sha256: {DIGEST}}}", "name ''"),
        ("- {name: a, sha256: abc}", "not 64 hexadecimal digits"),
        (f"- {{name: a, sha256: {DIGEST}, expires: soon}}", "expected a time"),
        (f"- {{name: a, sha256: {DIGEST}, expires: 3}}", "expected a time"),
        (f"- {{name: a, sha256: {DIGEST}, expires: 2026-13-01}}", "(not YAML|expected a time)"),
        (
            f"- {{name: a, sha256: {DIGEST}}}\n- {{name: b, sha256: {DIGEST.upper()}}}",
            "'a' and 'b' are the same key",
        ),
    ],
)
def test_a_bad_file_says_what_is_wrong(content: str, expected: str) -> None:
    """Each way to be wrong has a text of its own."""
    with pytest.raises(ValueError, match=expected):
        api_keys.parse_file(content.encode())


def test_a_key_in_place_of_its_digest_is_not_repeated() -> None:
    """Whoever puts the key itself into the file does not find it in the log."""
    key = api_keys.new_key()
    with pytest.raises(ValueError, match="keep the digest") as caught:
        api_keys.parse_file(f"- {{name: a, sha256: {key}}}".encode())
    assert key not in str(caught.value)


def test_a_variable_of_keys_is_read() -> None:
    """Commas and newlines separate; blanks are no matter."""
    keys = api_keys.parse_variable(f" a:{DIGEST},\n b:{'cd' * 32} \n")
    assert [key.name for key in keys] == ["a", "b"]


@pytest.mark.parametrize("text", ["", " ,\n", "a", f":{DIGEST}", "a:b", f"a:{DIGEST},b:{DIGEST}"])
def test_a_bad_variable_is_refused(text: str) -> None:
    """A variable that is set must name keys, each once."""
    with pytest.raises(ValueError, match=r"\w"):
        api_keys.parse_variable(text)


def test_the_end_of_a_key_is_exclusive() -> None:
    """At the instant of its end a key is expired, and not before."""
    end = datetime(2027, 1, 1, tzinfo=UTC)
    key = api_keys.ApiKey("a", DIGEST, expires=end)
    assert key.is_expired(end)
    assert not key.is_expired(end - timedelta(seconds=1))
    assert not api_keys.ApiKey("a", DIGEST).is_expired(end)
