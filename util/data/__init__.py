"""Where images come from, what becomes of them, and which samples make which step."""
