"""Model families: one file each, names as in Hugging Face."""
