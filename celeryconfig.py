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
task_create_missing_queues = True  # without it callbacks to a producer's own queue cannot be sent

# --- Delivery --------------------------------------------------------------------------------
# Jobs are claimed by worker/consumer.py and stay in Redis under the worker's lease until settled.
worker_consumer = "worker.consumer:JobConsumer"  # without it a lost connection loses running jobs
task_acks_late = True  # what the lease does; tools that read the configuration see it
worker_prefetch_multiplier = 1
worker_cancel_long_running_tasks_on_connection_loss = False
# Without it a lost connection warns of a setting that has no effect here.
worker_enable_prefetch_count_reduction = False  # without it each reconnection logs that it has none
control_queue_expires = None  # without it kombu renews the expiry each second, blocking the loop
worker_lost_wait = 1.0  # seconds for a dead pool process's last result; Celery's 10 delay its jobs
broker_transport_options = {
    "socket_connect_timeout": 3.0,  # seconds; without them a frozen Redis blocks the worker, and
    "socket_timeout": 3.0,  # the lease's thread, which must fail before the lease expires
    "health_check_interval": 5,  # seconds; with Celery's 25 a frozen Redis is noticed after 51
}
broker_connection_retry_on_startup = True  # without it a worker started before Redis gives up
broker_connection_max_retries = None  # without it a worker gives up on a Redis that stays away

# --- Bounds in time --------------------------------------------------------------------------
# Below the hard limit stand the database's own (storage.postgres.DatabaseLimits), so that it is
# PostgreSQL that ends a statement and the job can be tried again; the hard limit ends the rest.
task_time_limit = 600  # seconds; enforced by worker/dispatch.py for each batch
result_expires = 86_400  # seconds that a result can be polled; the ledger keeps it for longer

# --- What operators and pollers see ----------------------------------------------------------
worker_send_task_events = True  # without it Flower stays empty
result_backend_always_retry = True  # without it one lost connection costs a job its result
result_backend_max_retries = 3  # without it a worker waits for ever on a Redis that stays away
redis_socket_connect_timeout = 5.0  # seconds; without it a frozen Redis hangs the worker
redis_socket_timeout = 5.0  # seconds; Celery's 120 would stall pool processes for as long
redis_backend_health_check_interval = 5  # seconds; without it a lost connection fails a command
