"""Data: documents from a corpus or a synthetic task, tokenised and packed into batches."""
