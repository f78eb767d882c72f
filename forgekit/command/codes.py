"""Exit codes of the command."""

COMPLETED, FAILED, USAGE, GATES_FAILED, INTERRUPTED = 0, 1, 2, 3, 130
