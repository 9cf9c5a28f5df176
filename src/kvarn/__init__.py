"""kvarn: the place where the key-value cache of language models is managed."""
