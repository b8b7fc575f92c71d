"""Tests with OpenTelemetry's and Sentry's own libraries, attached by their documentation."""
