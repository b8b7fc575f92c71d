"""The protocol of the clients: which Redis commands a call sends, and how it reads the replies.

It does no I/O: each exchange is a generator that both clients execute.
"""
