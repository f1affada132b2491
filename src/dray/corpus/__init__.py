"""The corpus: raw files → cleaned, deduplicated, tokenised, packed token shards, and the stream of
their rows.

Names come from the modules themselves: importing this package imports nothing heavy.
"""
