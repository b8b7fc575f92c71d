"""Celery's settings that differ from their defaults, and defaults on which the worker relies.

The comment on each setting says what breaks without it. Addresses and sizes come from the
environment (worker/settings.py). At start-up worker/startup/options.py refuses values under which
the guarantees cannot hold.
"""

from interview_access.contracts import QUEUE
from kombu import Exchange, Queue

# --- The queue -------------------------------------------------------------------------------
# Without it workers consume Celery's default queue, `celery`.
task_queues = [Queue(QUEUE, Exchange("", type="direct"), routing_key=QUEUE)]
# Without it callbacks that name no queue are sent to `celery`, which no worker consumes.
task_default_queue = QUEUE

# --- Delivery --------------------------------------------------------------------------------
# Claims jobs, which stay in Redis under the worker's lease until they are settled. Celery's own
# consumer drops running jobs on a lost connection.
worker_consumer = "worker.execution.consumer:JobConsumer"
# The consumer acknowledges late in any case; without it `inspect conf` would report otherwise.
task_acks_late = True
# The consumer prefetches nothing; without it `inspect stats` would report four per pool process.
worker_prefetch_multiplier = 1
# Celery 6 will change the default to True, with which a lost connection ends running jobs.
worker_cancel_long_running_tasks_on_connection_loss = False
# Without it a reconnection logs a reduced prefetch count, which has no effect here.
worker_enable_prefetch_count_reduction = False
# Without it kombu renews the expiry each second and blocks the event loop meanwhile.
control_queue_expires = None
# Seconds to wait for the last result of a dead pool process. Celery's 10 delay its jobs.
worker_lost_wait = 1.0
broker_transport_options = {
    # Seconds. Without these timeouts a frozen Redis blocks the worker, and the lease's thread,
    # which must fail before the lease expires.
    "socket_connect_timeout": 3.0,
    "socket_timeout": 3.0,
    # Seconds. With kombu's 25 a dead connection for remote control is detected late.
    "health_check_interval": 5,
}
# Celery 5 derives it from `broker_connection_retry`; Celery 6 will not.
broker_connection_retry_on_startup = True
# Without it a worker exits after 100 attempts to reconnect.
broker_connection_max_retries = None

# --- Time limits -----------------------------------------------------------------------------
# Seconds; worker/execution/batch.py enforces it for each batch. The timeouts of the database
# session are lower, so that PostgreSQL ends a statement first and the job is retried.
task_time_limit = 600

# --- Monitoring and results ------------------------------------------------------------------
# Without it Flower shows no tasks.
worker_send_task_events = True
# For reads in a chord. Without it a connection lost while a chord is joined fails the chord.
result_backend_always_retry = True
# Without it such a read blocks its pool process during an outage.
result_backend_max_retries = 3
# Seconds. Without them a frozen Redis blocks pool processes, with Celery's 120 for as long.
redis_socket_connect_timeout = 5.0
redis_socket_timeout = 5.0
# Seconds. Without it the first command on a connection that was lost while idle fails.
redis_backend_health_check_interval = 5
