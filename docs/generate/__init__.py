"""Write the parts of the reference that are taken from the code: `python -m docs.generate`."""
