"""Names and conventions of other code."""
