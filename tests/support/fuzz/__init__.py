"""Generated queue messages of every kind: valid jobs, mistakes and attacks.

A message is what a client pushes to a Redis list: bytes. Valid jobs have the number of grants that
they must create; every other message must only be settled.
"""
