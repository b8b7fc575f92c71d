"""From a claimed message to a settled one: consuming, dispatching, executing."""
