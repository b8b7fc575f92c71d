"""Settings: the interview app alone, on the database that libpq's own variables name."""

import os

SECRET_KEY = "of no use: nothing is signed here"  # noqa: S105 - the service has no sessions
INSTALLED_APPS = ["interview"]
DATABASES = {
    "default": {"ENGINE": "django.db.backends.postgresql", "NAME": os.environ["PGDATABASE"]}
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
TIME_ZONE = "UTC"
