"""Tasks in which the tokens that matter are known: what a router should select, and does."""
