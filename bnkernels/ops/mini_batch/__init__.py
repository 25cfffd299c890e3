"""The next mini-batch, by a counter, and the rows of drawn ones."""
