"""A Django project of another team: created by startproject, changed file by file."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.platform import PATIENCE_SECONDS, Database

_START = """
import sys
from django.core.management import call_command
call_command("startproject", "service", sys.argv[1])
call_command("startapp", "interview")
"""
_MIGRATE = """
from django.core.management import call_command
call_command("makemigrations", "interview", verbosity=0)
call_command("migrate", verbosity=0)
"""
_DATABASES = """
import os
DATABASES["default"] = {
    "ENGINE": "django.db.backends.postgresql",
    "NAME": os.environ["PGDATABASE"],
}
"""


@dataclass(frozen=True)
class DjangoProject:
    """A project with an empty app ``interview``. Each command is a process of its own."""

    folder: Path

    @classmethod
    def create(cls, folder: Path) -> DjangoProject:
        """Create the project as ``django-admin startproject`` and ``startapp`` do."""
        subprocess.run(
            [sys.executable, "-c", _START, str(folder)],
            cwd=folder,
            check=True,
            timeout=PATIENCE_SECONDS,
        )
        project = cls(folder)
        project.append("service/settings.py", _DATABASES)
        return project

    def write(self, name: str, text: str) -> None:
        """Write a file of the project."""
        (self.folder / name).write_text(text, encoding="utf-8")

    def append(self, name: str, text: str) -> None:
        """Append to a file of the project."""
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(text)

    def migrate(self, database: Database) -> None:
        """Make the app's missing migration and apply all migrations."""
        self.run_python(_MIGRATE, database)

    def run(
        self, command: str, database: Database, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of a shell."""
        words = shlex.split(command)
        words[0] = str(Path(sys.executable).with_name(words[0]))
        return subprocess.run(
            words,
            cwd=self.folder,
            env={
                **os.environ,
                **database.environment,
                "DATABASE_URL": database.url,
                "PYTHONDONTWRITEBYTECODE": "1",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )

    def succeed(self, command: str, database: Database, **environment: str) -> str:
        """Run a command that succeeds. Returns what it prints."""
        done = self.run(command, database, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run_python(self, code: str, database: Database, **environment: str) -> list[str]:
        """Run code in the project's shell. Returns the lines that it prints."""
        command = f"python manage.py shell --verbosity 0 -c {shlex.quote(code)}"
        return self.succeed(command, database, **environment).splitlines()
