"""Tests of `mode.pretrained`."""
