"""Name what Khipu answers: the envelope, read strictly, with exact money."""
