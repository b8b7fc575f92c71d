"""Settings: accepted URLs, errors, and that no part of a password is shown."""

from __future__ import annotations

import string
from pathlib import Path
from urllib.parse import quote

import pytest
from click.testing import CliRunner
from interview_access.redis_address import RedisAddress, masked
from pydantic import ValidationError
from sqlalchemy import make_url

from storage.database_url import parse_database_url
from storage.schema import DatabaseUnavailableError, check_schema
from worker.broker.transport import BrokerConnection, celery_settings
from worker.cli import main
from worker.settings import ListenAddress, Settings, SettingsError

PIECES = ("hun", "ter2")
DATABASE = "postgresql://me@127.0.0.1/x"

MALFORMED_REDIS = [
    "redis://:hun#ter2@127.0.0.1:6379/0",
    "redis://:hun/ter2@127.0.0.1:6379/0",
    "redis://:hun?ter2@127.0.0.1:6379/0",
    "redis://:hun@ter2@127.0.0.1:6379/0",
    "redis://:hun[ter2@127.0.0.1:6379/0",
    "redis://:hun%ter2@127.0.0.1:6379/0",
    "redis://:hun ter2@127.0.0.1:6379/0",
    "redis://:hunter2\n@127.0.0.1:6379/0",
    "redis://hun:ter2@127.0.0.1:port/0",
    "redis://hunter2:@127.0.0.1:port/0",
    "redis://:hunter2/0",
    "redis://default:hunter2",
    "redis://:123/hunter2",
    "redis://127.0.0.1/0?password=hun&ter2=1",
    "redis://127.0.0.1/0?passwd=hun&ter2=1",
    "redis://127.0.0.1/0?password=hun@ter2",
    "redis://127.0.0.1/0?auth=hun&ter2=1",
    "redis://127.0.0.1/0#hunter2",
    "redis://127.0.0.1/0#hun@ter2",
    "redis://127.0.0.1/hun#ter2@a",
    "redis:hunter2@127.0.0.1",
    "hunter2",
    "sentinel://:hun;ter2@127.0.0.1:26379/0?master_name=jobs",
    "sentinel://:hun@a:1;sentinel://:ter2@b:2/0?master_name=jobs",
    "redis+socket://:hunter2@host/run/redis.sock",
    "unix://:hunter2@/run/redis.sock",
]

MALFORMED_POSTGRESQL = [
    "postgresql://me:hun@ter2@127.0.0.1/x",
    "postgresql://me:hun?ter2@127.0.0.1/x",
    "postgresql://me:hunter2@127.0.0.1:port/x",
    "postgresql://me:hunter2/x",
    "postgresql://127.0.0.1/x?password=hun&ter2=1",
    "postgresql://127.0.0.1/x?user=me&password=hun@ter2",
    "postgresql://127.0.0.1/x?user=me&password=hun+ter2",
    "postgresql://127.0.0.1/x?sslpassword=hun@ter2",
    "postgresql://127.0.0.1/x?sslpassword=hun&ter2=1",
    "postgresql://127.0.0.1/x?sslpassword=hun&sslmode=ter2",
    "postgresql://127.0.0.1:port/x?sslpassword=hun#ter2",
    "postgresql://me:hunter2@127.0.0.1/x?pool_mode=public",
    "postgresql://me:hunter2@127.0.0.1/x?sslmode=maybe",
    "postgresql://me:hunter2@127.0.0.1/x?connect_timeout=soon",
    "mysql://me:hun/ter2@127.0.0.1/x",
    "host=127.0.0.1 password=hun ter2",
    "host=127.0.0.1 password=hunter2 pool_mode=public",
    "host=127.0.0.1 passwd=hunter2",
    "jdbc:postgresql://127.0.0.1/x?user=me&password=hun&ter2=1",
    "jdbc:postgresql://me:hunter2@127.0.0.1/x?ssl=maybe",
    "postgresql://me:hunter2@127.0.0.1/x?sslaccept=strict",
    "postgres://me:hunter2@127.0.0.1,b:port/x",
    "postgresql://me:hunter2@127.0.0.1/x?host=a,b&port=1,2,3",
]


def refusal(**environment: str) -> str:
    """Return the error for an environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "REDIS_SENTINEL_PASSWORD"):
            patch.delenv(name, raising=False)
        for name, value in {"DATABASE_URL": DATABASE, **environment}.items():
            patch.setenv(name, value)
        with pytest.raises(SettingsError) as refused:
            Settings.from_environment()
    return str(refused.value)


class TestPasswords:
    """No output contains a part of a password, also of malformed URLs."""

    @pytest.mark.parametrize("url", MALFORMED_REDIS)
    @pytest.mark.parametrize("variable", ["CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"])
    def test_of_redis(self, variable: str, url: str) -> None:
        """The error for a Redis URL names the variable, what was received and what was expected."""
        error = refusal(**{"CELERY_BROKER_URL": "redis://127.0.0.1", variable: url})
        assert error.startswith(f"{variable}: got ")
        assert ", expected " in error
        assert not [piece for piece in PIECES if piece in error]
        assert len(error.splitlines()) == 1

    @pytest.mark.parametrize("url", MALFORMED_POSTGRESQL)
    def test_of_postgresql(self, url: str) -> None:
        """The error for a PostgreSQL URL does so as well."""
        error = refusal(CELERY_BROKER_URL="redis://127.0.0.1", DATABASE_URL=url)
        assert error.startswith("DATABASE_URL: got ")
        assert ", expected " in error
        assert not [piece for piece in PIECES if piece in error]
        assert len(error.splitlines()) == 1

    @pytest.mark.parametrize("url", [*MALFORMED_REDIS, *MALFORMED_POSTGRESQL])
    def test_of_any_url(self, url: str) -> None:
        """A masked URL contains no part of the password."""
        assert not [piece for piece in PIECES if piece in masked(url)]

    def test_in_validation_errors(self) -> None:
        """The validation errors of settings created in code contain no values."""
        with pytest.raises(ValidationError) as refused:
            Settings(database_url=MALFORMED_POSTGRESQL[0], celery_broker_url=MALFORMED_REDIS[0])
        assert not [piece for piece in PIECES if piece in str(refused.value)]

    def test_in_errors_of_postgresql(self) -> None:
        """The error for an unreachable database omits the secrets among the URL's options."""
        url = "postgresql://me@127.0.0.1:1/x?password=hunter2&sslpassword=hunter2"
        with pytest.raises(DatabaseUnavailableError) as refused:
            check_schema(parse_database_url(url))
        assert "127.0.0.1:1/x" in str(refused.value)
        assert "hunter2" not in str(refused.value)

    def test_in_representations(self) -> None:
        """The representations of settings, addresses and connections contain no password."""
        url = "sentinel://:hunter2@a:1;b:2/0?master_name=jobs"
        settings = Settings(
            database_url="postgresql://me:hunter2@h/x",
            celery_broker_url=url,
            redis_sentinel_password="hunter2",  # noqa: S106 - of no server
        )
        options = celery_settings(settings)
        connection = BrokerConnection(
            options["broker_read_url"], transport_options=options["broker_transport_options"]
        )
        shown = [settings, settings.broker, str(settings.broker), connection, connection.info()]
        assert "hunter2" not in repr(shown)
        assert "hunter2" in connection.as_uri(include_password=True)

    @pytest.mark.parametrize(
        "words", [["migrate"], ["status", "x"], ["cancel", "x"], ["dead-letters", "list"]]
    )
    def test_in_commands(self, words: list[str]) -> None:
        """Each command prints one line and ends with status 2."""
        self._ends_2(words, {"DATABASE_URL": MALFORMED_POSTGRESQL[0]}, "DATABASE_URL: got ")

    @pytest.mark.parametrize("url", MALFORMED_REDIS[:4])
    def test_in_grant(self, url: str) -> None:
        """``grant`` needs only the broker's URL, and refuses a malformed one."""
        words = ["grant", "--user", "x", "--interview", "i"]
        self._ends_2(words, {"CELERY_BROKER_URL": url}, "CELERY_BROKER_URL: got ")

    def _ends_2(self, words: list[str], environment: dict[str, str], prefix: str) -> None:
        complete = {"CELERY_BROKER_URL": "redis://127.0.0.1", "DATABASE_URL": None, **environment}
        done = CliRunner().invoke(main, words, env=complete, catch_exceptions=False)
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.startswith(prefix)
        assert not [piece for piece in PIECES if piece in done.stderr]
        assert len(done.stderr.splitlines()) == 1


class TestRedis:
    """Parsing of Redis URLs."""

    @pytest.mark.parametrize(
        ("url", "celery_url"),
        [
            ("redis://", "redis://127.0.0.1:6379/0"),
            ("redis://ann:p%40ss%23@h/2", "redis://ann:p%40ss%23@h:6379/2"),
            ("redis://:a;b@h", "redis://:a%3Bb@h:6379/0"),
            ("redis://h/1?virtual_host=3", "redis://h:6379/3"),
            ("redis://[::1]:7000/1", "redis://[::1]:7000/1"),
            ("rediss://h", "rediss://h:6379/0?ssl_cert_reqs=required"),
            ("rediss://h?ssl_cert_reqs=CERT_NONE", "rediss://h:6379/0?ssl_cert_reqs=none"),
            ("redis+socket:///run/r.sock", "redis+socket:///run/r.sock?virtual_host=0"),
            (
                "sentinel://:p@a:1;b/3?master_name=jobs",
                "sentinel://:p@a:1/3;sentinel://:p@b:26379/3",
            ),
            (
                "sentinel://:p@a:1/3;sentinel://:p@b:2/3?master_name=jobs",
                "sentinel://:p@a:1/3;sentinel://:p@b:2/3",
            ),
        ],
    )
    def test_the_url_for_celery(self, url: str, celery_url: str) -> None:
        """Every spelling of a URL has one form, which Celery and kombu read in the same way."""
        assert RedisAddress.parse(url).celery_url == celery_url

    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            ("redis://h:0", "a port from 1 to 65535"),
            ("redis://h:65536", "a port from 1 to 65535"),
            ("redis://h:1;h:2", "a host and a port"),
            ("redis://h/one", "a database number"),
            ("redis://h/-1", "a database number"),
            ("redis://h?ssl_cert_reqs=none", "no options but db, virtual_host, without ssl_cert"),
            ("rediss://h?ssl_cert_reqs=maybe", "required, optional or none"),
            ("rediss://h?ssl_ca_certs=/none", "a file that can be read"),
            ("rediss://h?ssl_check_hostname=perhaps", "true or false"),
            ("redis+socket://", "the path of a socket"),
            ("sentinel://a:1;b:2/0", "a master_name"),
            ("sentinel://a:1/0;sentinel://b:2/1?master_name=jobs", "one database number"),
            ("unix:///run/r.sock", "redis.socket:///PATH"),
        ],
    )
    def test_refused_urls(self, url: str, expected: str) -> None:
        """The error for a refused URL names what was expected."""
        with pytest.raises(ValueError, match=expected):
            RedisAddress.parse(url)


class TestPostgreSQL:
    """Parsing of PostgreSQL URLs."""

    @pytest.mark.parametrize(
        ("url", "read"),
        [
            ("postgresql://me:p@h/x", "postgresql+psycopg://me:p@h/x"),
            ("postgresql+psycopg://me@/x?host=/run", "postgresql+psycopg://me@/x?host=%2Frun"),
            ("postgresql://me:a%40b@[::1]:5432/x", "postgresql+psycopg://me:a%40b@[::1]:5432/x"),
            (
                "postgresql://me:p@a:1,b:2/x?target_session_attrs=read-write",
                "postgresql+psycopg://me:p@/x?host=a%2Cb&port=1%2C2&target_session_attrs=read-write",
            ),
            ("postgresql://me@h/x?password=p", "postgresql+psycopg://me:p@h/x"),
        ],
    )
    def test_accepted_urls(self, url: str, read: str) -> None:
        """URLs are converted to SQLAlchemy's form, also with several hosts."""
        assert parse_database_url(url) == read

    @pytest.mark.parametrize("special", [*string.punctuation, " ", "\n", "ß"])
    @pytest.mark.parametrize(
        "url",
        [
            "postgresql://a{0}b:p@h/x",
            "postgresql://me:a{0}b@h/x",
            "postgresql://me:p@h/a{0}b",
            "postgresql://me@h/x?password=a{0}b",
            "postgresql://me@h/x?sslpassword=a{0}b",
            "postgresql://me:p@/x?host=/run/a{0}b",
        ],
    )
    def test_parsing_is_idempotent(self, url: str, special: str) -> None:
        """Parsing a parsed URL returns the same URL, whatever characters its parts contain."""
        read = parse_database_url(url.format(quote(special, safe="")))
        assert parse_database_url(read) == read
        values = make_url(read).translate_connect_args() | dict(make_url(read).query)
        assert any(f"a{special}b" in str(value) for value in values.values())


class TestEnvironment:
    """Settings from environment variables."""

    def test_an_empty_variable_counts_as_unset(self) -> None:
        """An empty variable, as Compose passes for an unset one, counts as unset."""
        assert "CELERY_BROKER_URL: not set" in refusal(CELERY_BROKER_URL="")

    def test_an_empty_list_of_queues_is_refused(self) -> None:
        """A list without names is refused instead of allowing every queue."""
        error = refusal(CELERY_BROKER_URL="redis://h", GRANT_CALLBACK_QUEUES=" , ")
        assert error == (
            "GRANT_CALLBACK_QUEUES: got ' , ', expected at least one name, or an empty value"
        )

    @pytest.mark.parametrize("name", ["CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"])
    def test_variables_that_only_celery_reads_are_refused(self, name: str) -> None:
        """Broker variables that Celery would read without validation are refused."""
        error = refusal(CELERY_BROKER_URL="redis://h", **{name: "redis://:hunter2@h"})
        assert error == f"{name}: got a value, expected CELERY_BROKER_URL alone"

    def test_certificate_files(self, tmp_path: Path) -> None:
        """An existing certificate file is accepted."""
        file = tmp_path / "ca.pem"
        file.touch()
        assert RedisAddress.parse(f"rediss://h?ssl_ca_certs={file}").tls == {
            "ssl_cert_reqs": "required",
            "ssl_ca_certs": str(file),
        }


@pytest.mark.parametrize("text", ["127.0.0.1:9808", "[::1]:9808", "localhost:1"])
def test_a_listen_address(text: str) -> None:
    """An address is shown as it was given."""
    assert str(ListenAddress.parse(text)) == text


@pytest.mark.parametrize("text", ["9808", ":9808", "::1:9808", "a:0", "a:65536", "a b:1", "a:x"])
def test_a_listen_address_that_is_invalid(text: str) -> None:
    """The error names the form."""
    with pytest.raises(ValueError, match="HOST:PORT"):
        ListenAddress.parse(text)
