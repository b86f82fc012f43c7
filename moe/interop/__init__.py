"""Models of other libraries: one file a Hugging Face family, config and tensor names both ways."""
