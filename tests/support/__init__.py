"""What the tests share: servers, storages, workers, clients and generated messages."""
