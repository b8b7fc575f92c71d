"""Background services of the worker's main process: control requests and the outbox relay."""
