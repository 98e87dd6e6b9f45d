"""Files that the runtime reads and writes: models, their description, sessions."""
