"""What the verbs of the command line do: parse, call, print. Each module imports what its verbs need alone."""

INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM, as shells have it."""
