"""Our own figures beside what users would otherwise write, on the same servers in the same run."""
