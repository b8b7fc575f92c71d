"""The revisions in order. Each checks what is left to do, so that it can be run again."""
