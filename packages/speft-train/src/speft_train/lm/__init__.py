"""`speft-train eval`: lm-eval on adapted, exported and base models; tasks over local JSON Lines."""
