"""Fine-tuning with a plain torch loop: text -> blocks -> steps -> files."""
