"""The commands: arguments in, text and an exit status out."""
