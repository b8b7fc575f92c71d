"""Tracing and error reporting: what pool processes report of jobs to OpenTelemetry and Sentry."""
