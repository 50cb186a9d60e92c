"""The forward pass: a specification in NumPy, a fast CPU engine, a GPU engine, and what uses them."""
