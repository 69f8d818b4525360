"""Removes passwords, keys and tokens from URIs before they are shown or written.

A secret may contain unescaped characters such as `/`, `@`, blanks and `?`, so its end within a sentence is ambiguous.
Then everything that may belong to it is removed, even if that removes a word of the message. Masking is idempotent.
"""

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any
from urllib.parse import unquote

MASK = "***"
# After a blank, a quote or a bracket a new URI begins; elsewhere it is part of the previous one.
START = re.compile(r"(?<![^\s\"'`(\[{<,;])(?:[\w+.-]+::)*[A-Za-z][A-Za-z0-9+.-]*://")
# User and password, up to the last @: a password may contain unescaped special characters.
USERINFO = re.compile(r"[^/?:]*?(?::|%3[Aa])(.*)@", re.DOTALL)
QUERY = re.compile(r"\?(?=[^\s\"'`)\]},;:.!?])")
NAME = re.compile(r"[\w.%\[\]-]{1,64}")
# Parameters of pyarrow's file systems (https://arrow.apache.org/docs/python/filesystems.html) that are not secret, and
# the form of the values that are shown.
HARMLESS = {
    *("region", "scheme", "endpoint_override", "anonymous", "allow_bucket_creation", "allow_bucket_deletion"),
    *("background_writes", "check_directory_existence_before_creation", "force_virtual_addressing"),
    *("allow_delayed_open", "smart_defaults", "tls_verify_certificates", "retry_limit_seconds", "replication"),
    *("buffer_size", "default_block_size", "use_mmap"),
}
PLAIN = re.compile(r"[\w.:/+-]*(?=$|[\s\"'`)\]}>]|[,;:.](?:\s|$))")
# A path that may contain a secret: a scheme, one slash, and later a user with a password, an @ or a query.
ONE_SLASH = re.compile(
    r"(?<![\w+.:-])((?:[\w+.-]+::)*[A-Za-z][A-Za-z0-9+.-]+):/(?=[^/\s])"
    rf"(?=\S*[@?]|[^/?:\n]*(?::|%3[Aa]).*@|.*{QUERY.pattern})"
)
MASKED = re.compile(r"\*\*\*(?!\w)")
SHORTEST = 4  # characters of a secret that is searched in a client library's message


def with_slashes(text: str) -> str:
    """A text with the double slash restored in URIs that were normalised as paths."""
    return ONE_SLASH.sub(r"\1://", text) if ":/" in text else text


def without_secrets(text: str) -> str:
    """For messages: in all URIs of a text, user and password and the values of queries become `***`."""
    text = with_slashes(text)
    if "://" not in text:
        return text
    return "\n".join(_line(line) if "://" in line else line for line in text.split("\n"))


def _line(line: str) -> str:
    first = line.index("://")
    bounds = [0, *(match.start() for match in START.finditer(line) if match.start() > first), len(line)]
    return "".join(_segment(line[start:end]) for start, end in pairwise(bounds))


def _segment(text: str) -> str:
    """Mask a text that contains one URI, perhaps with others inside it; everything to the end may belong to it."""
    for mark in re.finditer("://", text):
        found = USERINFO.match(text, mark.end())
        if found:
            rest = text[found.end() :]
            if "?" in found[0]:  # in the password, or before a query that contains an @
                rest = "&".join([MASK, *(_parameter(part) for part in rest.split("&")[1:])])
            text = f"{text[: mark.end()]}{MASK}@{rest}"
            break
    query = QUERY.search(text, text.index("://"))
    if query:
        text = text[: query.end()] + "&".join(_parameter(part) for part in text[query.end() :].split("&"))
    return text


def _parameter(text: str) -> str:
    """Mask the value in `name=value` of a query, unless it is known to be harmless; a bare word counts as a token."""
    name, equals, value = text.partition("=")
    if MASKED.match(text) or (equals and MASKED.match(value)):
        return text
    plain = PLAIN.match(value)
    if equals and name.lower() in HARMLESS and plain:
        query = QUERY.search(value, plain.end())  # of another URI later in the sentence
        return text if not query else f"{name}={value[: query.end()]}{_parameter(value[query.end() :])}"
    is_token = not value.lstrip("=").strip()  # base64 tokens end like this
    return f"{name}={MASK}" if equals and NAME.fullmatch(name) and not is_token else MASK


def secrets_of(uri: str) -> list[str]:
    """The strings that `without_secrets` hides in one URI, both escaped and unescaped; longest first."""
    rest = uri.partition("://")[2]
    found = USERINFO.match(rest)
    hidden = [found[1]] if found else []
    query = QUERY.search(rest, found.end() if found else 0)
    for part in rest[query.end() :].split("&") if query else ():
        if _parameter(part) != part:
            hidden.append(part.partition("=")[2] or part)
    both = {form for secret in hidden for form in (secret, unquote(secret)) if len(form) >= SHORTEST}
    return sorted(both, key=len, reverse=True)


def hidden(text: str, uri: str) -> str:
    """A client library's message about a URI, with the URI's secrets masked everywhere in the text."""
    text = text.replace(uri, without_secrets(uri)) if "://" in uri else text
    for secret in secrets_of(uri):
        text = text.replace(secret, MASK)
    return without_secrets(text)


def secretless(data: Any) -> Any:
    """A copy of plain nested data, with `without_secrets` applied to every text."""
    if isinstance(data, Mapping):
        return {secretless(key): secretless(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [secretless(value) for value in data]
    return without_secrets(data) if isinstance(data, str) else data


def split_query(uri: str) -> tuple[str, str, str]:
    """URI, question mark, query; fsspec's own URIs have no query."""
    return (uri, "", "") if uri.startswith("fsspec+") or "://" not in uri else uri.partition("?")


def public_name(where: str) -> str:
    """The name of a place in tables: a URI without user, password and query; a path unchanged."""
    scheme, mark, rest = split_query(where)[0].partition("://")
    if not mark:
        return where
    host, slash, path = rest.partition("/")
    host = host.rpartition("@")[2]
    if ":" in host and not re.fullmatch(r"[^:]*:\d*|\[[^\]]*\](:\d*)?", host):  # not a port: part of a password
        return split_query(without_secrets(where))[0]
    return without_secrets(f"{scheme}://{host}{slash}{path}")
