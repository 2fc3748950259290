"""Layers of networks over tokens."""
