"""The process: puts storage, tasks and Celery together, and decides nothing of the business."""
