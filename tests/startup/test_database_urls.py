"""DATABASE_URL as other drivers write it, on the real server; encodings and collations."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url, text

from devstack.servers import LocalStack
from storage.connections import open_engine, parse_url
from storage.database_url import FOREIGN_OPTIONS, parse_database_url
from storage.errors import StorageError
from storage.postgres import PostgresStorage
from storage.schema import SchemaMismatchError, check_schema, migrate
from tests.startup.checks import PASSWORD, check, refusal
from tests.storage.migrations import KEY, migrated
from tests.support.database import connected, database, role
from tests.support.relay import Relay
from tests.support.stores import PostgresStore
from tests.support.workers import ROOT, Site

PAGE = (ROOT / "docs" / "databases.md").read_text(encoding="utf-8")
FORMS = re.findall(
    r"^\| ([^|]+) \| `([^`]+[/=][^`]+)` \|$", PAGE.partition("## Options")[0], re.MULTILINE
)
"""What each documented form of the URL is written for, and the form."""
USER = "Zoë 日本語 🦊"


@pytest.fixture(scope="module")
def relay(here: Site) -> Iterator[Relay]:
    """A TCP port of the server, which itself listens on a Unix socket only."""
    relay = Relay(f"{make_url(here.store.database_url).query['host']}/.s.PGSQL.5432")
    yield relay
    relay.close()


@pytest.fixture(scope="module")
def closed_port() -> Iterator[int]:
    """A TCP port that refuses connections."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture
def password_file(
    here: Site, relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Libpq's password file; its service file is set in the environment."""
    services, passwords = tmp_path / "services.conf", tmp_path / "pgpass"
    name = make_url(here.store.database_url).database
    services.write_text(
        f"[platform]\nhost=127.0.0.1\nport={relay.port}\ndbname={name}\nuser=postgres\n"
        f"password={PASSWORD}\n",
        encoding="utf-8",
    )
    passwords.write_text(f"*:*:*:*:{PASSWORD}\n", encoding="utf-8")
    passwords.chmod(0o600)
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    return passwords


@pytest.fixture
def url(
    request: pytest.FixtureRequest,
    here: Site,
    relay: Relay,
    closed_port: int,
    password_file: Path,
) -> str:
    """A documented form of the URL, with the names of the test's server in it."""
    given = make_url(here.store.database_url)
    folder = str(given.query["host"])
    values = {
        "USER": "postgres",
        "PASSWORD": PASSWORD,
        "HOST": "127.0.0.1",
        "5432": str(relay.port),
        "5433": str(closed_port),
        "DATABASE": str(given.database),
        "/var/run/postgresql": folder,
        "%2Fvar%2Frun%2Fpostgresql": folder.replace("/", "%2F"),
        "NAME": "platform",
        "/etc/worker/pgpass": str(password_file),
    }
    return re.sub("|".join(values), lambda found: values[found[0]], request.param)


class TestForms:
    """The forms of docs/databases.md on the real server."""

    @pytest.mark.parametrize("url", [form for _, form in FORMS], indirect=True)
    def test_each_form_connects(self, here: Site, url: str) -> None:
        """Each form connects with the password given, and passes the checks of ``migrate``."""
        engine = open_engine(parse_url(url), application_name="test")
        try:
            with engine.connect() as connection:
                driver = connection.connection.driver_connection
                assert isinstance(driver, psycopg.Connection)
                assert driver.info.password == PASSWORD
                name = connection.scalar(text("SELECT current_database()"))
        finally:
            engine.dispose()
        assert name == make_url(here.store.database_url).database
        sentences: list[str] = []
        migrate(url, dry_run=True, report=sentences.append)
        assert [sentence.partition(":")[0] for sentence in sentences] == ["nothing to do"]

    @pytest.mark.parametrize(
        "url", [form for name, form in FORMS if name in {"Prisma", "a service file"}], indirect=True
    )
    def test_a_worker_accepts_prisma(
        self, here: Site, url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A worker's checks pass without a warning."""
        check(url, here.broker)
        assert caplog.text == ""

    def test_the_page_has_every_style(self) -> None:
        """The table of forms has rows of each kind."""
        names = " ".join(name for name, _ in FORMS)
        for style in ("Prisma", "JDBC", "Rails", "Heroku", "asyncpg", "keywords", "service"):
            assert style in names

    def test_every_foreign_option_is_documented(self) -> None:
        """Each option of another driver is in the table of its libpq name, or among the ignored."""
        rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| `(\w+)`", PAGE, re.MULTILINE)
        renamed = {name: to for names, to in rows for name in re.findall(r"\w+", names)}
        ignored = re.findall(r"`(\w+)`", PAGE.partition("are ignored,")[2].partition("refused")[0])
        documented = {**dict.fromkeys(ignored), **renamed}
        documented = {name: to for name, to in documented.items() if name in FOREIGN_OPTIONS}
        assert documented == FOREIGN_OPTIONS

    def test_libpqs_variables_supply_what_the_url_omits(
        self, here: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An empty URL takes host, user and database from the environment."""
        parsed = make_url(here.store.database_url)
        monkeypatch.setenv("PGHOST", str(parsed.query["host"]))
        monkeypatch.setenv("PGUSER", "postgres")
        monkeypatch.setenv("PGDATABASE", str(parsed.database))
        assert check_schema("postgresql://") is None


class TestOptions:
    """Options of other drivers."""

    @pytest.mark.parametrize(
        ("query", "becomes"),
        [
            ("ssl=true", {"sslmode": "verify-full"}),
            ("ssl=false", {"sslmode": "disable"}),
            ("ssl=require", {"sslmode": "require"}),
            ("ssl=true&sslmode=require", {"sslmode": "require"}),
            ("targetServerType=master", {"target_session_attrs": "primary"}),
            ("loadBalanceHosts=true", {"load_balance_hosts": "random"}),
            ("tcpKeepAlive=false", {"keepalives": "0"}),
            ("currentSchema=a,b", {"options": "-c search_path=a,b"}),
            ("schema=a,b", {"options": '-c search_path="a,b"'}),
            (
                "schema=My%20%22app%22&options=-c%20jit%3Doff",
                {"options": '-c jit=off -c search_path="My\\ ""app"""'},
            ),
            ("connection_limit=5&pool=5&socketTimeout=3", {}),
        ],
    )
    def test_options_become_those_of_libpq(self, query: str, becomes: dict[str, str]) -> None:
        """An option is renamed, or ignored if it tunes the other driver; libpq's own wins."""
        assert dict(parse_url(f"postgresql://h/x?{query}").query) == becomes

    @pytest.mark.parametrize(
        ("query", "expected"),
        [
            ("sslaccept=strict", "sslmode=verify-full&sslrootcert=FILE"),
            ("sslidentity=id.p12", "sslcert=FILE&sslkey=FILE"),
            ("sslfactory=org.postgresql.ssl.NonValidatingFactory", "sslmode=require for any"),
            ("socketFactory=x", "a host, or the folder of a Unix socket"),
            ("variables=x", "options=-c%20NAME%3DVALUE"),
            ("ssl=maybe", "ssl to be true or false or disable"),
            ("targetServerType=secondary", "targetServerType to be primary"),
            ("host=a,b&port=1,2,3", "one port, or one for each host"),
            ("host=a,b&port=1,x", "port to be from 1 to 65535"),
            ("host=a:1&host=b:2&port=3", "ports beside their hosts"),
            ("schema=a&schema=b", "schema at most once"),
            ("pool_mode=session", "only options of libpq; unknown: pool_mode"),
            # For JDBC, ssl without a value is verify-full. SQLAlchemy drops such an option.
            ("ssl", "a value for each option (ssl=true, not ssl); none for: ssl"),
            ("sslmode=&user=me", "a value for each option (ssl=true, not ssl); none for: sslmode"),
            ("sslaccept", "a value for each option (ssl=true, not ssl); none for: sslaccept"),
        ],
    )
    def test_refused_options(self, query: str, expected: str) -> None:
        """An option that changes the security or the meaning is refused with its replacement."""
        with pytest.raises(ValueError, match=re.escape(expected)):
            parse_database_url(f"postgresql://h/x?{query}")

    @pytest.mark.parametrize(
        "query",
        [
            f"sslmode=prefer;password={PASSWORD}",
            f"password=x&{PASSWORD}",
            f"password=x&{PASSWORD}=1",
        ],
    )
    def test_a_refusal_does_not_show_a_password(self, query: str) -> None:
        """The rest of a password that is not encoded, or of another syntax, is not shown."""
        with pytest.raises(ValueError, match="option") as refused:
            parse_database_url(f"postgresql://h/x?{query}")
        assert PASSWORD not in str(refused.value)

    @pytest.mark.parametrize(
        ("url", "hosts", "ports"),
        [
            ("postgresql://[::1]:5432,[::2]:5433/x", "::1,::2", "5432,5433"),
            ("postgresql://a,b:5433/x", "a,b", ",5433"),
            ("postgresql:///x?host=a,b&port=5433", "a,b", "5433,5433"),
            ("postgresql://me@:5433/x?host=a,b", "a,b", "5433,5433"),
            ("host=a,b port=1,2 dbname=x", "a,b", "1,2"),
        ],
    )
    def test_several_hosts(self, url: str, hosts: str, ports: str) -> None:
        """Several hosts have one port, or one each, wherever they are written."""
        read = make_url(parse_database_url(url))
        assert (read.query["host"], read.query["port"]) == (hosts, ports)
        assert parse_database_url(parse_database_url(url)) == parse_database_url(url)

    def test_the_password_of_jdbc_is_kept(self) -> None:
        """User and password among the options are kept, and masked where the URL is shown."""
        read = parse_url(f"jdbc:postgresql://h/x?user=me&password={PASSWORD}")
        assert (read.username, read.password) == ("me", PASSWORD)
        assert PASSWORD not in repr(read)

    def test_the_schema_of_prisma_holds_the_tables(self, database_url: str) -> None:
        """``migrate`` creates the tables in the schema of the URL, whose case counts."""
        with connected(database_url, autocommit=True) as connection:
            connection.execute(text('CREATE SCHEMA "The App"'))
            url = f"{database_url}&schema=The%20App"
            migrated(url)
            assert check_schema(url) is None
            schemas = connection.execute(
                text("SELECT DISTINCT schemaname FROM pg_tables WHERE tablename LIKE 'grant_%'")
            )
            assert schemas.scalars().all() == ["The App"]

    def test_a_missing_schema_is_refused(self, here: Site) -> None:
        """A search path without an existing schema is refused by the worker and by ``migrate``."""
        url = f"{here.store.database_url}&schema=nowhere"
        expected = 'got the search_path "nowhere", expected one with a schema that exists'
        assert expected in refusal(url, here.broker)
        with pytest.raises(SchemaMismatchError, match=expected):
            migrate(url, dry_run=True, report=lambda _: None)

    def test_an_unknown_setting_is_refused(self, here: Site) -> None:
        """A setting that the server does not know stops the worker instead of making it wait."""
        url = f"{here.store.database_url}&options=-c%20nonsense%3D1"
        assert "unrecognized configuration parameter" in refusal(url, here.broker)


class TestEncodings:
    """Encodings of the database and of the connection."""

    @pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1", "EUC_JP", "MULE_INTERNAL"])
    def test_other_encodings_are_refused(
        self, here: Site, stack: LocalStack, encoding: str
    ) -> None:
        """Another encoding than UTF8 stops the worker and ``migrate``, also with ``--dry-run``."""
        with database(stack.database_url, options=f"ENCODING '{encoding}' LOCALE 'C'") as url:
            assert encoding in refusal(url, here.broker)
            for dry_run in (True, False):
                with pytest.raises(StorageError, match=f"{encoding}.*(UTF8|not supported)"):
                    migrate(url, dry_run=dry_run, report=lambda _: None)

    @pytest.mark.parametrize("where", ["role", "database", "variable", "url", "options"])
    def test_the_connection_is_utf8(
        self, postgres: PostgresStore, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        """A user ID is stored exactly, whatever client_encoding is set elsewhere."""
        with role(postgres.database_url) as other:
            name, url = make_url(other).username, postgres.database_url
            with connected(url, autocommit=True) as connection:
                connection.execute(text(f"ALTER ROLE {name} SUPERUSER"))
                if where == "role":
                    connection.execute(text(f"ALTER ROLE {name} SET client_encoding = latin1"))
            if where == "database":
                postgres.configure("client_encoding", "latin1")
            elif where == "variable":
                monkeypatch.setenv("PGCLIENTENCODING", "latin1")
            addition = {
                "url": "&client_encoding=latin1",
                "options": "&options=-c%20client_encoding%3Dlatin1",
            }
            storage = PostgresStorage(other + addition.get(where, ""))
            try:
                with storage.transaction() as transaction:
                    assert transaction.value("SHOW client_encoding", None) == "UTF8"
                    stored = transaction.value("SELECT convert_to(%s, 'UTF8')", (USER,))
            finally:
                storage.close()
        assert bytes(stored) == USER.encode()


class TestCollations:
    """Collations whose order may have changed since an index was built."""

    def test_a_changed_database_is_a_warning(
        self, here: Site, stack: LocalStack, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Worker and ``migrate`` name the affected indexes and the statements to run."""
        options = "LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8' LOCALE 'C'"
        with database(stack.database_url, options=options) as url:
            assert not [sentence for sentence in migrated(url) if "warning" in sentence]
            name = make_url(url).database
            with connected(url, autocommit=True) as connection:
                connection.execute(
                    text("UPDATE pg_database SET datcollversion = '0.1' WHERE datname = :name"),
                    {"name": name},
                )
                sentences: list[str] = []
                migrate(url, dry_run=True, report=sentences.append)
                check(url, here.broker)
                (warning, nothing) = sentences
                assert warning.startswith(f"warning: the database {name} has version 0.1")
                assert nothing.startswith("nothing to do")
                assert warning.removeprefix("warning: ") in caplog.text
                statements = re.findall(r"(?:REINDEX|ALTER) [^;]*", warning)
                assert f"REINDEX INDEX CONCURRENTLY public.{KEY}" in statements
                assert not [statement for statement in statements if "_like" in statement]
                assert not [statement for statement in statements if "grant_access" in statement]
                documented = re.findall(r"^(REINDEX.*|ALTER DATABASE.*);$", PAGE, re.MULTILINE)
                named = [statement.replace("platform", str(name)) for statement in documented]
                assert len(named) == 2
                assert set(named) <= set(statements)
                for statement in statements:
                    connection.execute(text(statement))
            assert migrated(url) == [nothing]

    def test_a_changed_collation_of_a_column_is_a_warning(self, migrated_url: str) -> None:
        """A collation of a column is named by itself, and only the indexes that use it."""
        with connected(migrated_url, autocommit=True) as connection:
            for statement in (
                "CREATE COLLATION local (provider = builtin, locale = 'C.UTF-8')",
                "ALTER TABLE interview_interviewattempt ALTER user_id TYPE text COLLATE local",
                "UPDATE pg_collation SET collversion = '0.1' WHERE collname = 'local'",
            ):
                connection.execute(text(statement))
        (warning, _) = migrated(migrated_url)
        assert warning.startswith("warning: the collation public.local has version 0.1")
        assert warning.count("REINDEX") == 1
        assert "interview_interviewattempt_user_id" in warning
        assert warning.endswith("ALTER COLLATION public.local REFRESH VERSION")
