"""Django's migrations of the tables that the worker owns."""
