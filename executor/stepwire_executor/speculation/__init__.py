"""Drafts of tokens: who proposes them, and how many of them the model samples as well."""
