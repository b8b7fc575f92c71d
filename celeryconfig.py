"""Celery's policy: what each setting is for, or what breaks without it.

Holds the settings that differ from Celery's defaults, and those whose default the worker relies on.
Addresses and sizes come from the environment (worker/settings.py). A copy with another policy gives
up the guarantees that depend on the changed settings; with another `worker_consumer` or
`task_acks_late` the worker does not start (worker/startup/options.py).
"""

from interview_access.contracts import QUEUE
from kombu import Exchange, Queue

# --- The queue -------------------------------------------------------------------------------
task_queues = [Queue(QUEUE, Exchange("", type="direct"), routing_key=QUEUE)]
# Without it workers consume Celery's default queue, `celery`.
task_default_queue = QUEUE
# Without it callbacks that name no queue go to `celery`, which no worker consumes.

# --- Delivery --------------------------------------------------------------------------------
# Jobs are claimed by this consumer and stay in Redis under the worker's lease until settled.
worker_consumer = "worker.execution.consumer:JobConsumer"
# Celery's own consumer drops running jobs on a lost connection.
task_acks_late = True
# Jobs are acknowledged after their results in any case; `inspect conf` would say otherwise.
worker_prefetch_multiplier = 1
# No job is prefetched in any case; `inspect stats` would report four for each pool process.
worker_cancel_long_running_tasks_on_connection_loss = False
# The default of Celery 5; with the True announced for Celery 6 a lost connection ends running jobs.
worker_enable_prefetch_count_reduction = False
# Without it a reconnection logs a reduced prefetch count, which limits nothing here.
control_queue_expires = None  # without it kombu renews the expiry each second, blocking the loop
worker_lost_wait = 1.0  # seconds for a dead pool process's last result; Celery's 10 delay its jobs
broker_transport_options = {
    "socket_connect_timeout": 3.0,  # seconds; without them a frozen Redis blocks the worker, and
    "socket_timeout": 3.0,  # the lease's thread, which must fail before the lease expires
    "health_check_interval": 5,  # seconds; kombu's 25 detect a dead remote-control connection late
}
broker_connection_retry_on_startup = True
# Celery 5 derives it from `broker_connection_retry`; without it Celery 6 will not.
broker_connection_max_retries = None  # without it a worker exits after 100 attempts to reconnect

# --- Time limits -----------------------------------------------------------------------------
# The database's limits (storage.postgres.DatabaseLimits) are lower, so that PostgreSQL ends a
# statement and the job is retried; the hard limit ends everything else.
task_time_limit = 600  # seconds; enforced by worker/execution/dispatch.py for each batch
result_expires = 86_400  # seconds; Celery's default, which the contract promises to pollers

# --- Monitoring and results ------------------------------------------------------------------
worker_send_task_events = True  # without it Flower shows no tasks
result_backend_always_retry = True
# For reads in a chord; without it a connection lost while a chord is joined fails the chord.
result_backend_max_retries = 3  # without it such a read blocks its pool process during an outage
redis_socket_connect_timeout = 5.0  # seconds; without it a frozen Redis blocks pool processes
redis_socket_timeout = 5.0  # seconds; with Celery's 120 a frozen Redis blocks them for as long
redis_backend_health_check_interval = 5
# Seconds; without it the first command on a connection that was lost while idle fails.
