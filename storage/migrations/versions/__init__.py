"""The revisions, oldest first. Each finds by looking what is left to do, so it can be run again."""
