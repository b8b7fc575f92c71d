"""Tests of worker/execution/: from a claimed message to a settled one."""
