"""How fast models train, and what training costs."""
