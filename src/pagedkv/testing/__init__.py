"""What tests of a paged cache need: oracles, derived tolerances, poisoned memory. Users import it, no layer does."""
