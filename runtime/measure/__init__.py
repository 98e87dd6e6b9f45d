"""Measuring speed and quality, and plots of both. Knows no command."""
