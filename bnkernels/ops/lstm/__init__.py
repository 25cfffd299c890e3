"""An LSTM layer over whole sequences, with batch norm, layer norm or no norm in it."""
