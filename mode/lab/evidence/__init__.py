"""The isoFLOP laboratory: many runs at equal training FLOPs, and what they are evidence for."""
