"""Bugs of other libraries that must not happen here: each test is named after the upstream issue it guards against."""
