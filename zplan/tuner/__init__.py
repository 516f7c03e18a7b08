"""The search: propose a configuration, screen it, run it, record it, learn from it, name the winner."""
