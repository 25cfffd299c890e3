"""Names and conventions of other code, so that its callers stay as they are when a norm is put in another's place."""
