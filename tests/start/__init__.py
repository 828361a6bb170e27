"""How the starts of whole models are found."""
