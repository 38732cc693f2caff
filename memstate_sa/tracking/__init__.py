"""Which classes are facts, and what an index sees of them."""
