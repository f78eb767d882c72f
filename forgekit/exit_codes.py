"""Exit codes of the command, and of each `forgekit run` that a sweep or a job starts; 128 + n when signal n ended it."""

COMPLETED, FAILED, USAGE, GATES_FAILED, INTERRUPTED = 0, 1, 2, 3, 130
