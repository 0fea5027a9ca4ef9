"""A model behind HTTP: completions in OpenAI's format, holes, frames as they come, and log-probabilities."""
