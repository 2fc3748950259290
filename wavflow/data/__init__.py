"""Manifests, data sets and the toy world."""
