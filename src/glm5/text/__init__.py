"""Text to ids and back: tokenizer, chat formats, streams."""
