"""Enqueue grant-access jobs of the Interview Access Worker, and read their results.

>>> from interview_access.producer import InterviewAccessClient
>>> client = InterviewAccessClient("redis://localhost:6379/0")  # doctest: +SKIP
>>> job_id = client.enqueue("user-1", ["89d96f4b-c19d-4e69-8eae-e818f3123b09"])  # doctest: +SKIP
>>> client.wait(job_id, timeout=30)  # doctest: +SKIP
{'success': True, 'created_access_count': 1}
"""
