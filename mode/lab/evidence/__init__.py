"""The isoFLOP laboratory: many runs at equal training FLOPs, and the claims that they support."""
