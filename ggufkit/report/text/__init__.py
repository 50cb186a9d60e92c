"""Results as text for people: one file a command."""
