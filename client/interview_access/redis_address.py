"""Addresses of Redis servers, parsed from Celery's URLs.

No text that this module produces contains a part of a password, even if the URL is malformed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

FORMS = {
    "redis": "redis://:PASSWORD@HOST:6379/0",
    "rediss": "rediss://:PASSWORD@HOST:6379/0",
    "redis+socket": "redis+socket:///PATH?virtual_host=0",
    "sentinel": "sentinel://:PASSWORD@HOST:26379;HOST:26379/0?master_name=NAME",
}
"""An example of each scheme."""

_OTHER_NAMES = {
    "redis+sentinel": "sentinel",
    "redis+unix": "redis+socket",
    "unix": "redis+socket",
    "valkey": "redis",
    "valkeys": "rediss",
}
"""Schemes of other libraries."""

EXPECTED = f"{', '.join(list(FORMS.values())[:-1])} or {FORMS['sentinel']}"

_DATABASE = ("db", "virtual_host")
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_TLS = ("ssl_cert_reqs", "ssl_check_hostname", *_FILES)
_OPTIONS = {
    "redis": _DATABASE,
    "rediss": (*_DATABASE, *_TLS),
    "redis+socket": _DATABASE,
    "sentinel": (*_DATABASE, *_TLS, "master_name"),
}
_PORTS = {"redis": 6379, "rediss": 6379, "sentinel": 26379}

_LIKE_A_SECRET = re.compile(r"pass|pw|secret|token|auth|cred|key(?!file)", re.IGNORECASE)
_HOST = r"(?:[\w.-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?"
_PLAIN_HOST = re.compile(
    # A name without a port might be a password.
    r"(?P<host>localhost|\d{1,3}(?:\.\d{1,3}){3}|[\w-]+(?:\.[\w-]+)+(?=:))"
    r"(?P<port>:\d{1,5})?(?P<path>/\d{0,2})?"
)
_PLAIN = re.compile(
    # Allowed after the last @: hosts, and a path that cannot be the end of a password.
    rf"(?P<hosts>{_HOST}(?:[;,](?:sentinel://)?{_HOST})*)?(?P<path>/[\w./-]*)?"
)


def masked(url: str) -> str:
    """Mask the parts of a URL that could belong to a password, for an error or a log line.

    Args:
        url: Any text.

    Returns:
        The masked URL in quotes, or a description if the text is not a URL.
    """
    scheme, separator, rest = url.partition("://")
    if not separator and _PLAIN_HOST.fullmatch(url):
        return repr(url)
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]{0,30}", scheme):
        return "no URL" if url else "an empty value"
    head, question, query = rest.partition("?")
    if "#" in rest or "@" in query:  # any part may belong to a password
        return repr(f"{scheme}://***")
    before, at, after = head.rpartition("@")
    # The user name of a Redis URL is masked as well: it might be a misplaced password.
    user = None if scheme in FORMS else re.match(r"[\w.-]{1,64}(?=:.)", before)
    credentials = f"{user[0]}:***@" if user else "***@" if at else ""
    plain = _PLAIN.fullmatch(after)
    if plain is None:
        return repr(f"{scheme}://{credentials}***")
    path = plain["path"] or ""
    if plain["hosts"] and not at and not re.fullmatch(r"(/\d*)?", path):
        path = "/***"
    return repr(f"{scheme}://{credentials}{plain['hosts'] or ''}{path}{question and '?***'}")


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """The address and credentials of a Redis server.

    Attributes:
        scheme: ``redis``, ``rediss``, ``redis+socket`` or ``sentinel``.
        hosts: Names and ports, of the Sentinels if there are any; empty for a socket.
        path: Path of the socket.
        database: Number of the database.
        username: The Redis user; None for the default one.
        password: The user's password.
        tls: redis-py's ``ssl_…`` options; None without TLS.
        master_name: Name of the Redis server among the Sentinels.
        sentinel_password: Password of the Sentinels.
    """

    scheme: str
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    database: int = 0
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    tls: Mapping[str, Any] | None = None
    master_name: str = ""
    sentinel_password: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str, *, sentinel_password: str | None = None) -> Self:
        """Parse one of Celery's URLs.

        Args:
            url: The URL. For Sentinels its query has ``master_name``.
            sentinel_password: The password of the Sentinels, if they have one.

        Raises:
            ValueError: if the URL is invalid. The text says what was expected, and does not quote
                the URL.
        """
        scheme, separator, rest = url.partition("://")
        if not separator:
            raise ValueError(f"{_with_scheme(url) or EXPECTED}; the scheme is missing")
        if scheme in _OTHER_NAMES:
            raise ValueError(f"{FORMS[_OTHER_NAMES[scheme]]}, not {scheme}://")
        if scheme not in FORMS:
            raise ValueError(EXPECTED)
        try:
            return cls._parse(scheme, rest, sentinel_password)
        except _UnexpectedError as error:
            raise ValueError(f"{error}, as in {FORMS[scheme]}") from None

    @classmethod
    def _parse(cls, scheme: str, rest: str, sentinel_password: str | None) -> Self:
        if not rest.isprintable() or " " in rest:
            raise _UnexpectedError("a URL without spaces and control characters")
        parts = _split(rest.split(";") if scheme == "sentinel" else [rest])
        username, password = _credentials(parts)
        path, given = "", ""
        hosts: tuple[tuple[str, int], ...] = ()
        if scheme == "redis+socket":
            path = _socket(parts[0])
        else:
            hosts = _hosts(parts, _PORTS[scheme])
            given = _same((part.path.strip("/") for part in parts), "database number")
        options = _options(scheme, parts)
        tls = _tls(options)
        database = options.get("virtual_host", options.get("db", given)).strip("/") or "0"
        if not re.fullmatch(r"[0-9]{1,9}", database):
            raise _UnexpectedError("a database number")
        if scheme == "sentinel" and not options.get("master_name"):
            raise _UnexpectedError("a master_name, the name by which the Sentinels know the Redis")
        return cls(
            scheme,
            hosts,
            path,
            int(database),
            username,
            password,
            {"ssl_cert_reqs": "required", **tls} if tls or scheme == "rediss" else None,
            options.get("master_name", ""),
            sentinel_password if scheme == "sentinel" else None,
        )

    @property
    def celery_url(self) -> str:
        """The URL for Celery and kombu: without their options, and each Sentinel in full."""
        user, word = (quote(one or "", safe="") for one in (self.username, self.password))
        credentials = f"{user}:{word}@" if word else f"{user}@" if user else ""
        if self.scheme == "redis+socket":
            return f"redis+socket://{credentials}{quote(self.path)}?virtual_host={self.database}"
        query = f"?{urlencode(self.tls)}" if self.tls else ""
        return ";".join(
            f"{self.scheme}://{credentials}{f'[{host}]' if ':' in host else host}:{port}"
            f"/{self.database}{query}"
            for host, port in self.hosts
        )

    @property
    def connection_options(self) -> dict[str, Any]:
        """Arguments of redis-py's client, except host and path."""
        options = {"db": self.database, "username": self.username, "password": self.password}
        return {**options, **self._tls_options}

    @property
    def sentinel_credentials(self) -> dict[str, Any]:
        """Password and TLS options of redis-py's clients of the Sentinels."""
        return {"password": self.sentinel_password, **self._tls_options}

    @property
    def _tls_options(self) -> dict[str, Any]:
        return {} if self.tls is None else {"ssl": True, **self.tls}

    def __str__(self) -> str:
        if self.scheme == "redis+socket":
            return self.path
        hosts = ", ".join(f"{host}:{port}" for host, port in self.hosts)
        return f"{self.master_name} of the Sentinels {hosts}" if self.master_name else hosts


class _UnexpectedError(ValueError):
    """A part of the URL is invalid; the text says what was expected."""


def _with_scheme(text: str) -> str | None:
    """Complete the URL of a host that was given without a scheme."""
    plain = _PLAIN_HOST.fullmatch(text)
    if plain is None or plain["port"]:
        return plain and f"redis://{text}"
    return f"redis://{plain['host']}:6379{plain['path'] or '/0'}"


def _split(urls: list[str]) -> list[SplitResult]:
    """Split the URL of each host."""
    try:
        parts = [urlsplit("//" + url.removeprefix("sentinel://")) for url in urls]
    except ValueError:  # brackets that enclose no IPv6 address
        raise _UnexpectedError(_ENCODED) from None
    for part in parts:
        beyond = f"{part.path}?{part.query}"
        if part.fragment or part.netloc.count("@") > 1 or "@" in beyond:
            raise _UnexpectedError(_ENCODED)
        if re.search(r"%(?![0-9A-Fa-f]{2})", part.netloc + beyond):
            raise _UnexpectedError(_ENCODED)
    return parts


_ENCODED = (
    "special characters in user name and password to be percent-encoded"
    " (%40 for @, %2F for /, %23 for #, %25 for %)"
)


def _options(scheme: str, parts: list[SplitResult]) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in parts:
        options |= parse_qsl(part.query, keep_blank_values=True)
    if unknown := options.keys() - set(_OPTIONS[scheme]):
        # Beside a secret, an unknown option might be a part of it.
        secret = any(_LIKE_A_SECRET.search(name) for name in options)
        names = "" if secret else f", without {', '.join(sorted(unknown))[:100]}"
        raise _UnexpectedError(f"no options but {', '.join(_OPTIONS[scheme])}{names}")
    return options


def _tls(options: Mapping[str, str]) -> dict[str, Any]:
    tls: dict[str, Any] = {name: options[name] for name in _TLS if name in options}
    if "ssl_cert_reqs" in tls:
        tls["ssl_cert_reqs"] = tls["ssl_cert_reqs"].removeprefix("CERT_").lower()
        if tls["ssl_cert_reqs"] not in {"required", "optional", "none"}:
            raise _UnexpectedError("ssl_cert_reqs to be required, optional or none")
    if "ssl_check_hostname" in tls:
        if tls["ssl_check_hostname"].lower() not in {"true", "false"}:
            raise _UnexpectedError("ssl_check_hostname to be true or false")
        tls["ssl_check_hostname"] = tls["ssl_check_hostname"].lower() == "true"
    for name in _FILES:
        if name in tls and not os.access(tls[name], os.R_OK):
            raise _UnexpectedError(f"{name} to name a file that can be read")
    return tls


def _credentials(parts: list[SplitResult]) -> tuple[str | None, str | None]:
    given = {(part.username, part.password) for part in parts if "@" in part.netloc}
    if len(given) > 1:
        raise _UnexpectedError("one user name and password for all hosts")
    username, password = given.pop() if given else (None, None)
    return unquote(username or "") or None, unquote(password or "") or None


def _socket(part: SplitResult) -> str:
    if part.netloc.rpartition("@")[2] or not part.path.strip("/"):
        raise _UnexpectedError("the path of a socket")
    return unquote(part.path)


def _hosts(parts: list[SplitResult], default_port: int) -> tuple[tuple[str, int], ...]:
    hosts = []
    for part in parts:
        text = part.netloc.rpartition("@")[2]
        try:
            port = part.port
        except ValueError:
            port = 0
        if (text and not re.fullmatch(_HOST, text)) or port == 0:
            raise _UnexpectedError("a host and a port from 1 to 65535")
        hosts.append((part.hostname or "127.0.0.1", port or default_port))
    return tuple(hosts)


def _same(values: Iterable[str], what: str) -> str:
    given = {value for value in values if value}
    if len(given) > 1:
        raise _UnexpectedError(f"one {what} for all hosts")
    return given.pop() if given else ""
