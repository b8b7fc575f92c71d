"""The reference model: the storage interface in dictionaries, for tests.

Transactions are serialized by one lock and work on a copy of the tables, which replaces the tables
when the transaction commits.
"""

from storage.memory.storage import MemoryStorage
from storage.memory.transaction import MemoryTransaction

__all__ = ["MemoryStorage", "MemoryTransaction"]
