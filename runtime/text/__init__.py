"""Text on its way into the model and out of it: tokenizers, chat templates, streaming, stop strings."""
