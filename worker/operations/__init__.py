"""What an operator does with the queue: inspect it, pause it, remove jobs from it."""
