"""Notebook 02's room: embeddings, and the index that answers are searched in."""
