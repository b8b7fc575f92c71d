"""Local servers for development: the demo, `interview-access up`, tests and benchmarks.

Runs PostgreSQL and Valkey from Python wheels. Not part of a production installation.
"""
