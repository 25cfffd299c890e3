"""What is counted without a GPU: launches, bytes, registers, predicted limits."""
