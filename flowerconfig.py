"""Flower's settings: what its pages say about the jobs and the queue of this worker.

Flower reads this file from its working directory, or from where ``--conf`` or ``FLOWER_CONF`` says.
docs/flower.md describes the pages.
"""

from flower.urls import handlers

from worker.monitoring.flower_pages import PAGES, describe_task

# Without the result a list of tasks would not tell cancelled jobs from expired ones.
tasks_columns = "name,uuid,state,result,received,runtime,worker"
format_task = describe_task
# Flower has no setting for the broker's page: it counts the lists of kombu, which the queue is not.
# The first handler of a path responds.
handlers[:0] = PAGES
