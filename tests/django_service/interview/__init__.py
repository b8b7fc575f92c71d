"""The app whose four tables the worker shares."""
