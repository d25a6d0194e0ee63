"""Worked examples, and a study of the method: `python -m examples.study`."""
