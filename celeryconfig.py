"""Celery's policy: each setting that is not Celery's default, and what breaks without it.

Addresses and sizes come from the environment (worker/settings.py). Those who need another policy
set it in a copy, and lose the promises that hang on it.
"""

from interview_access.contracts import QUEUE
from kombu import Exchange, Queue

# --- The queue -------------------------------------------------------------------------------
task_queues = [Queue(QUEUE, Exchange("", type="direct"), routing_key=QUEUE)]
# Without it workers listen on Celery's own queue, `celery`.
task_default_queue = QUEUE  # without it a retry goes to `celery`, where nobody listens
task_create_missing_queues = False  # without it a typo in `-Q` makes a queue that nobody fills

# --- Delivery --------------------------------------------------------------------------------
# The transport (worker/transport.py) keeps what a worker holds in Redis, under the worker's lease.
worker_consumer = "worker.delivery:JobConsumer"  # without it one bad header ends the worker
task_acks_late = True  # without it a job whose worker dies was acknowledged before it was done
worker_prefetch_multiplier = 1  # without it a child hoards jobs behind a long one
worker_cancel_long_running_tasks_on_connection_loss = False
# Without it a lost connection ends every job, though the lease outlives it.
worker_lost_wait = 1.0  # seconds for a dead child's last words; Celery's 10 hold its job up
broker_transport_options = {
    "socket_connect_timeout": 5.0,  # seconds; without them a frozen Redis hangs the worker, and
    "socket_timeout": 5.0,  # the lease's thread, whose patience must be shorter than the lease
}
broker_connection_retry_on_startup = True  # without it a worker started before Redis gives up
broker_connection_max_retries = None  # without it a worker gives up on a Redis that stays away

# --- Bounds in time --------------------------------------------------------------------------
# Below the hard limit stand the database's own (storage.postgres.DatabaseLimits), so that it is
# PostgreSQL that ends a statement and the job can be tried again; the hard limit ends the rest.
task_time_limit = 600  # seconds; without it a child that hangs is never freed
result_expires = 86_400  # seconds that a result can be polled; the ledger keeps it for longer

# --- What operators and pollers see ----------------------------------------------------------
worker_send_task_events = True  # without it Flower stays empty
task_track_started = True  # without it a running job reads PENDING, as one that nobody sent
result_backend_always_retry = True  # without it one lost connection costs a job its result
result_backend_max_retries = 3  # without it a worker waits for ever on a Redis that stays away
redis_socket_connect_timeout = 5.0  # seconds; without it a frozen Redis hangs the worker
redis_socket_timeout = 30.0  # seconds; Celery's default is longer than our patience with a lock
