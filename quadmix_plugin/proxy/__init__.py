"""Proxy models: the token pool, the decoder and its trainer."""
