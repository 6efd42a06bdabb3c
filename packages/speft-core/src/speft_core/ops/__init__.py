"""The k entries of a weight gradient, computed without the rest: the readable oracle, the plans, and the choice among them."""
