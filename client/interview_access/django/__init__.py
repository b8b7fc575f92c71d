"""Django app of the Interview Access Worker: tables, admin pages, checks and a migration operation.

Add ``"interview_access.django"`` to ``INSTALLED_APPS``. docs/django.md describes its use.
"""
