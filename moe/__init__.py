"""The model: a decoder-only transformer whose feed-forward layers are routed experts."""
