"""The last layer of a classifier with its loss."""
