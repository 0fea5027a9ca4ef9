"""What the verbs of the command line do: parse, call, print. Each module imports what its verbs need alone."""
