"""What every command found, rendered: one file for each output format, and nothing is computed here."""
