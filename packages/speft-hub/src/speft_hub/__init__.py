"""Publish, verify, merge and export sparse adapters: the Hugging Face Hub, a compatible endpoint, or a plain folder."""
