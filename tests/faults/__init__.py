"""Whatever dies, wherever: each job counts once and none is lost."""
