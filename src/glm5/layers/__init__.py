"""Packed and native modules for the three seams of the network, and the table that swaps them in."""
