"""See docs in the modules."""
