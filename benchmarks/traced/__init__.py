"""Apps of this project's worker with a tracing library, whose spans and events are discarded."""
