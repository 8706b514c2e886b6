"""Mathematics as people write it: read without evaluating it, and compared."""
