"""Pretrained models, routed: which layers, and how they get well again."""
