"""ggufkit: is it the GGUF file, the tokenizer and template, or my engine? Answered with evidence."""

__version__ = "0.1.0"
