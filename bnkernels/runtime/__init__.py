"""How a kernel gets launched; knows no op."""
