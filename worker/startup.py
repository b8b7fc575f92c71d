"""What a worker looks at before it takes its first job."""
from celery import Celery
from worker.settings import Settings
def check_servers(settings: Settings, app: Celery) -> None: ...
